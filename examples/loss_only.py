"""Only the loss: a bigram student learns from a bigram teacher on its own samples. CPU, seconds."""

import torch

from megatron_tropd.losses import LogitsSignal, LossTargets, preset, tropd_loss

VOCAB, ROWS, LENGTH, STEPS = 32, 16, 24, 200
torch.manual_seed(0)
teacher = torch.nn.Embedding.from_pretrained(2 * torch.randn(VOCAB, VOCAB))  # logits of the next
student = torch.nn.Embedding(VOCAB, VOCAB)
optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
config = preset("tropd", top_k=8)  # TrOPD as published; forward KL on 8 tokens of 32


def sample() -> torch.Tensor:
    """[ROWS, LENGTH + 1] ids drawn from the student, after a random first one."""
    ids = torch.randint(VOCAB, (ROWS, 1))
    for _ in range(LENGTH):
        ids = torch.cat([ids, student(ids[:, -1]).softmax(-1).multinomial(1)], dim=1)
    return ids


for step in range(STEPS + 1):
    ids = sample()
    inputs, labels = ids[:, :-1].flatten(), ids[:, 1:].flatten()  # position t predicts token t + 1
    targets = LossTargets(
        ids_T=labels,
        is_teacher_T=torch.zeros_like(labels, dtype=torch.bool),  # no teacher prefixes here
        uniforms_T=torch.rand(len(labels)),  # the trust region's draws
    )
    signal = LogitsSignal(teacher(inputs), VOCAB)
    output = tropd_loss(
        student(inputs), targets, signal, config=config, vocab_size=VOCAB, group=None
    )
    optimizer.zero_grad()
    output.loss_T.mean().backward()
    optimizer.step()
    if step % 40 == 0:
        mean = output.values["reverse_kl"].mean()
        print(f"step {step:3d}   reverse KL {mean:.4f} nats per token")
