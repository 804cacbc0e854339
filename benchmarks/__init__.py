"""Measurements of exo_fast against the tools in use today: suites of cases, their runner, report and predictions."""
