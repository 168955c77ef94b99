"""The Hugging Face hub: what a run made is pushed there, and what others pushed is read from there."""
