"""From prompts to completions: the decode loop, where weights are meanwhile, and the engines behind one seam."""
