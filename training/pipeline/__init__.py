"""Recipes: several stages in order, each run once, each in a process of its own."""
