"""Pages made from a run's numbers: report.html, the model card, the evaluation, the upload."""
