"""Runs a folder with `transformers`. This is a script for an interpreter that has transformers and
torch. It shares no code with this project, which never imports it.

    python transformers_run.py REQUEST.json FOLDER

REQUEST is {"model": folder, "dtype": "float32", "rows": [[ids], ..], "prompts": ["text", ..],
"max_new_tokens": n, "end_of_text": id, "num_ids": n}. Ids from num_ids on are never drawn. FOLDER
gets logits.npz ("0", "1", ..: [T, vocab] float32 of each row) and answer.json: {"class", "dtype",
"ids": [[ids of prompt], ..], "new": [[greedy], ..], "text": [..]}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]


def main(request_path: Path, folder: Path) -> None:
    request = json.loads(request_path.read_text(encoding="utf-8"))
    dtype = getattr(torch, request["dtype"])
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(request["model"], dtype=dtype, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(request["model"])
    answer = {"class": type(model).__name__, "dtype": request["dtype"]}
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in request["prompts"]]
    end = request["end_of_text"]
    unused = list(range(request["num_ids"], model.config.vocab_size))
    logits, new = {}, []
    with torch.no_grad():
        for i, row in enumerate(request["rows"]):
            logits[str(i)] = model(torch.tensor([row])).logits[0].float().numpy()
        for ids in prompts:
            found = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                do_sample=False,
                max_new_tokens=request["max_new_tokens"],
                eos_token_id=end,
                pad_token_id=end,
                suppress_tokens=unused or None,
            )
            row = found[0, len(ids) :].tolist()
            new.append(row[: row.index(end)] if end in row else row)
    text = [tokenizer.decode(row, skip_special_tokens=True) for row in new]
    np.savez(folder / "logits.npz", **logits)
    answer |= {"ids": prompts, "new": new, "text": text}
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
