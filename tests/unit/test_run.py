import pytest

from spd_dist.tracking.stage_outputs import job_type


@pytest.mark.parametrize(
    ("first", "last", "job"),
    [
        ("calibrate", "evaluate", "pipeline"),
        ("calibrate", "project", "project"),
        ("generate", "generate", "generate"),
        ("project", "generate", "pipeline"),
        ("evaluate", "evaluate", "evaluate"),
    ],
)
def test_a_job_is_named_by_the_folder_that_it_fills(first, last, job):
    assert job_type(first, last) == job
