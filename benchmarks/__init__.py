"""What exo_fast gains over the tools in use today, measured: suites of cases, their runner, report and predictions."""
