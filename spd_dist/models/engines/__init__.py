"""What decodes: one seam, several engines."""
