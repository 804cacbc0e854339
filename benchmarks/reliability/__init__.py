"""Checks that are not about speed: killed and damaged trainings, and equal results in any number of processes."""
