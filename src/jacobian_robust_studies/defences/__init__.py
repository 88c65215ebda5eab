"""Defences beside one another at equal cost: ``jacobian-robust study defences``, in a clone of the project.

Each method of conf/defences.yaml has the same number of trials, judged on validation images. Its best trial is trained
for longer, finalists with several seeds, and attacked on test images. A method whose step takes as long as c plain
steps has one c-th of the steps. Run again, the command makes only what is missing. In reading order: plan, run, record,
report, figures.
"""
