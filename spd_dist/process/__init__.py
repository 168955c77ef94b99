"""The process that a rank is: its requests to stop, its launcher, and the machine that it runs on."""
