"""A workspace of a W&B project as code: the panels that compare trainings and evaluations, in their order.

``python examples/wandb_workspace.py ENTITY [PROJECT]`` saves it as a view of the project and prints its address. This
needs ``pip install wandb-workspaces`` and ``wandb login``. Without arguments it lists the panels, without a server.
"""

import sys
from typing import Any

NORMS = {"linf": "ℓ∞", "l2": "ℓ2"}

PANELS: dict[str, list[tuple[str, str, Any]]] = {
    "Training": [
        ("line", "Accuracy on validation images", {"x": "epoch", "y": ["validation/accuracy"]}),
        ("line", "Accuracy under attack, validation images", {"x": "epoch", "y": ["validation/robust_accuracy"]}),
        ("line", "Loss", {"x": "epoch", "y": ["train/loss"], "log_y": True}),
        ("line", "Penalty", {"x": "epoch", "y": ["train/penalty"], "log_y": True}),
        ("line", "Norm of the Jacobian", {"x": "epoch", "y": ["validation/jacobian_norm"], "log_y": True}),
        ("line", "Weight η of the penalty", {"x": "epoch", "y": ["eta"]}),
    ],
    **{
        f"Robustness in {said}": [
            (
                "line",
                f"Accuracy against budget, {said}",
                {
                    "x": f"robustness/eps_{norm}",
                    "metric_regex": f"robustness/accuracy_{norm}/.*",
                    "title_x": "budget ε",
                    "range_y": (0.0, 1.0),
                },
            ),
            ("media", f"Curves and adversarial examples, {said}", [f"accuracy_{norm}", f"examples_{norm}"]),
        ]
        for norm, said in NORMS.items()
    },
    "Certificates and checks": [
        ("media", "Certified accuracy", ["certified_linf", "certified_l2"]),
        ("media", "Prediction and calibration", ["first_order", "calibration", "noise"]),
    ],
}
"""By section: the kind of each panel, its title, and its metrics or pictures."""


def workspace(entity: str, project: str) -> Any:
    """Return the workspace, which is not saved yet."""
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name} is missing: pip install wandb-workspaces")

    def panel(kind: str, title: str, of: Any) -> Any:
        if kind == "media":
            return reports.MediaBrowser(title=title, media_keys=[f"figures/{name}" for name in of])
        return reports.LinePlot(title=title, **of)

    sections = [
        workspaces.Section(name=name, panels=[panel(*described) for described in panels], is_open=True)
        for name, panels in PANELS.items()
    ]
    return workspaces.Workspace(name="Robustness", entity=entity, project=project, sections=sections)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        for section, panels in PANELS.items():
            print(f"{section}: {'; '.join(title for _, title, _ in panels)}")
    else:
        saved = workspace(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "jacobian_robust").save()
        print(saved.url)
