"""A policy of your own: skip a layer if the previous one hardly changed the end of the prompt.

No training and no routers: at each layer the policy compares the mean hidden state of the last
quarter of the prompt with that of one layer earlier. If the cosine of the two is above a threshold,
the layer is skipped. The example shows how little code a policy takes. Its answers may be bad: only
an evaluation at equal executions shows whether a policy is worth using.

    python examples/own_policy.py [--model smollm2-135m] [--threshold 0.985] [PROMPT …]
"""

from __future__ import annotations

import argparse

import torch

import drllm

PROMPTS = (
    "Question: What is the capital of France?\nAnswer:",
    "Question: Which planet is the largest?\nAnswer:",
    "Once upon a time, a small robot found a garden behind the station. It",
)


@drllm.POLICIES.register("settled")
class SettledPolicy(drllm.Policy):
    """Skip a layer if the previous one hardly changed the end of the prompt; never two in a row."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def decide(self, layer: int, prompts: drllm.PromptView) -> torch.Tensor:
        """Return 0 for prompts whose end hardly changed, else 1."""
        end = prompts.windows(4).means[:, -1]  # [B, D]; zeros where a prompt has under 4 tokens
        if layer == 0:
            decisions = torch.ones(prompts.num_rows, dtype=torch.long, device=end.device)
        else:
            similarity = torch.cosine_similarity(end, self.before.to(end.device))
            # A skipped layer changes nothing, so its states don't show that the prompt has settled.
            ran = self.decisions.to(end.device) == 1
            decisions = torch.where(ran & (similarity > self.threshold), 0, 1)
        self.before = end
        self.decisions = decisions
        return decisions


def main() -> None:
    """Answer each prompt with all layers and with the policy, and print both answers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", nargs="*", default=PROMPTS, metavar="PROMPT")
    parser.add_argument("--model", default="smollm2-135m", help="alias, hub id or folder")
    parser.add_argument("--threshold", type=float, default=0.985, help="a cosine")
    parser.add_argument("--max-new-tokens", type=int, default=12)
    options = parser.parse_args()
    base = drllm.load(options.model)
    routed = drllm.attach(base)
    for prompt in options.prompts:
        print(repr(prompt))
        inputs = base.tokenizer(prompt, return_tensors="pt").to(base.model.device)
        for policy in (drllm.FullPolicy(), SettledPolicy(options.threshold)):
            with routed.using(policy):
                output = routed.generate(
                    **inputs,
                    max_new_tokens=options.max_new_tokens,
                    do_sample=False,
                    pad_token_id=base.tokenizer.pad_token_id,
                )
            [route] = routed.last_route.tolist()
            answer = base.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
            skipped = [layer for layer, decision in enumerate(route) if decision == 0]
            print(f"  {type(policy).__name__}: {sum(route)} layers, skipped {skipped}")
            print(f"    {answer!r}")


if __name__ == "__main__":
    main()
