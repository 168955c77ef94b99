"""What numbers are worth: intervals, comparisons, subspace algebra, corpora."""
