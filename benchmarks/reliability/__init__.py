"""Checks of correctness: killed and damaged trainings, and equal results in any number of processes."""
