"""What runs inside a sandbox: the standard library alone, and nothing that is worth stealing."""
