"""The run folder: files that appear whole, manifests, corpora, answers and the subspace."""
