"""The end of a run, an experiment or rounds: `report.json`, the table and the page."""
