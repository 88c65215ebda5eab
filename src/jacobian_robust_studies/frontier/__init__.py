"""Is there a trade-off between accuracy and robustness? ``jacobian-robust study frontier``, in a clone of the project.

Each method of conf/frontier.yaml is trained at several strengths, lengths and seeds. Trainings of a length cost the
same: a method whose step takes as long as c plain steps has one c-th of the steps. Validation images choose a strength
of each method, at a least accuracy that is the same for all relative to the undefended twin. The chosen networks meet
AutoAttack on test images. Run again, the command makes only what is missing. In reading order: plan, run, record,
report, figures.
"""
