"""Stages beside the method: what some arms need before they write, and what the page shows of what was written."""
