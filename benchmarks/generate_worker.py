"""One way of going on from a prompt, greedily: Ratoon, Transformers, or llama.cpp. Imports only what its way needs, so
that another Python, which has llama.cpp alone, can run it.

A unit of work is two calls: one for `new` tokens, one for a single token. Their difference is decoding alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from workers import Turns

PROMPT = """The harbour of the small town lies between two hills, and on a clear morning one can see the islands from
the upper road. For three hundred years its people lived on herring; then the fish went elsewhere, and the boats that
were left took visitors to the lighthouse. An old engineer, who had kept its lamp for half of his life, used to tell
them how a lens of glass rings gathers the light of a flame no larger than a hand, and sends it twenty miles over the
water. He explained it slowly, step by step, because he thought that whoever has understood one machine is no longer
afraid of the others. This is how he began:"""

Call = Callable[[int], list[int]]
"""How many new tokens -> their ids."""


def serve(call: Call, options: dict[str, Any], facts: dict[str, Any] | None = None) -> None:
    """Answer with the seconds of every call so far, and the tokens."""
    found: dict[str, Any] = {"whole_seconds": [], "first_seconds": [], **(facts or {})}
    turns = Turns(options["warm_up"], options["new"] + 1, found)
    while True:
        turns.step()
        for name, new in (("whole_seconds", options["new"]), ("first_seconds", 1)):
            began = time.perf_counter()
            ids = call(new)
            found[name].append(time.perf_counter() - began)
            if len(ids) != new:
                raise RuntimeError(f"{len(ids)} tokens came out, {new} were asked for")
            if new == options["new"]:
                found["ids"] = ids


def prompt(options: dict[str, Any]) -> None:
    """The prompt's ids, cut to the length asked for."""
    import ratoon

    ids = ratoon.load(options["model"], device="cpu").encode(PROMPT)[: options["prompt_tokens"]]
    if len(ids) < options["prompt_tokens"]:
        raise RuntimeError(f"the prompt has {len(ids)} tokens, {options['prompt_tokens']} were asked for")
    print(json.dumps({"ids": ids}))


def ratoon_way(options: dict[str, Any]) -> None:
    """Through the public entrance; the tokens are made into text as well, as always."""
    import ratoon

    lm = ratoon.load(options["model"], dtype=options["dtype"], device="cpu")

    def call(new: int) -> list[int]:
        return lm.generate([options["prompt"]], max_new_tokens=new, min_new_tokens=new)[0].ids

    serve(call, options)


def save_peer(options: dict[str, Any]) -> None:
    """Transformers' reading of the GGUF file as a folder, so that the peer need not dequantize at every start."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder, _, file = options["model"].rpartition("/")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype="float32")
    # Its weights are plain float32 by now; it refuses to save what it remembers as quantized.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(options["folder"])
    print("{}")


def peer(options: dict[str, Any]) -> None:
    """`generate` of Transformers."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(options["folder"], dtype=getattr(torch, options["dtype"])).eval()
    given = torch.tensor([options["prompt"]])
    mask = torch.ones_like(given)

    @torch.inference_mode()
    def call(new: int) -> list[int]:
        out = model.generate(given, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        ids: list[int] = out[0, given.shape[1] :].tolist()
        return ids

    serve(call, options)


def llama(options: dict[str, Any]) -> None:
    """llama.cpp through its Python binding: the file's quantized weights as they are, as many threads as cores."""
    import os

    from llama_cpp import Llama, __version__

    cores = len(os.sched_getaffinity(0))
    model = Llama(options["model"], n_ctx=512, n_threads=cores, n_threads_batch=cores, verbose=False, logits_all=False)

    def call(new: int) -> list[int]:
        model.reset()  # else the prompt of the call before would not be read again
        ids: list[int] = []
        for id in model.generate(options["prompt"], temp=0.0, repeat_penalty=1.0, reset=False):
            ids.append(id)
            if len(ids) == new:
                break
        return ids

    serve(call, options, {"version": __version__})


if __name__ == "__main__":
    chosen = json.loads(sys.argv[1])
    ways = {"prompt": prompt, "save_peer": save_peer, "ratoon": ratoon_way, "peer": peer, "llama": llama}
    ways[chosen["way"]](chosen)
