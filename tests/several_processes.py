"""What torchrun starts in two processes: a training with a JacobianPenalty, whose gradient it saves."""

import sys

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.strategies import DDPStrategy
from torch.utils.data import DataLoader, Subset

from jacobian_robust.lightning import JacobianPenalty, RobustnessMonitor
from jacobian_robust.penalties import Lagrangian, Margin
from tests.test_lightning import CPU, Classifier, the_data

if __name__ == "__main__":
    accumulated = int(sys.argv[2])
    constraint = Lagrangian(penalty=Margin(eps=1.0), rate=0.5, damping=1.0)
    penalties = [
        JacobianPenalty(Margin(eps=1.0), weight=0.7),
        JacobianPenalty(constraint, weight=0.0, name="constraint"),
    ]
    trainer = Trainer(
        **CPU,
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        accumulate_grad_batches=accumulated,
        max_steps=1,
        callbacks=[*penalties, RobustnessMonitor(eps=0.05, images=20)],
        use_distributed_sampler=False,
    )
    module, data = Classifier(), the_data(16)
    mine = Subset(data, range(trainer.global_rank, 16, 2))
    trainer.fit(module, DataLoader(mine, batch_size=8 // accumulated), DataLoader(mine, batch_size=8))
    weights, gradients = module.taken[0]
    saved = {"weights": weights, "gradients": gradients, "multipliers": constraint.multipliers}
    saved["robust_accuracy"] = trainer.callback_metrics["robust_accuracy"]
    torch.save(saved, f"{sys.argv[1]}/{trainer.global_rank}.pt")
