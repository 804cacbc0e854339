"""Numbers of a run as pages: report.html, the model card, the evaluation, the upload."""
