"""`report.html`: a comparison of arms as one page that needs no network.

figures     what is drawn, as SVG
render      templates to text
page        one run
experiment  one experiment, over its seeds
"""

from spd_dist.runtime.page.experiment import write_experiment_page
from spd_dist.runtime.page.page import write_page

__all__ = ["write_experiment_page", "write_page"]
