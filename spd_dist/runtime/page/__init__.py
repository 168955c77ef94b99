"""`report.html`: the comparison of arms as one page that needs no network."""

from spd_dist.runtime.page.page import write_page

__all__ = ["write_page"]
