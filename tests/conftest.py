"""Property tests draw the same cases every time, and take as long as a busy machine needs."""

from hypothesis import settings

settings.register_profile("spd", deadline=None, derandomize=True, database=None)
settings.load_profile("spd")
