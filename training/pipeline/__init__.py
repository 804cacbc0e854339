"""Recipes: several stages in order. Each runs once, in a process of its own."""
