"""Engines in processes of their own: a program of the user's, vLLM, a server."""
