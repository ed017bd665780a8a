"""A training script of Lightning, as its users write them: python lightning_script.py BASE DATA OUT."""

import json
import sys
from pathlib import Path

import lightning
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    get_cosine_schedule_with_warmup,
)

base, data, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
stop = tokenizer.convert_tokens_to_ids("<|user|>")


def encode(messages):
    """The prompt and the answer; only the answer and the token that ends it are trained."""
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    answer = [*tokenizer.encode("\n" + messages[-1]["content"], add_special_tokens=False), stop]
    return {"input_ids": [*prompt, *answer], "labels": [*[-100] * len(prompt), *answer]}


class Tuner(lightning.LightningModule):
    """The usual module around a causal language model, with the loss that the model returns."""

    def __init__(self):
        super().__init__()
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        self.model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)

    def training_step(self, batch, index):
        """The loss of a batch."""
        return self.model(**batch).loss

    def configure_optimizers(self):
        """AdamW with a cosine schedule, stepped after each optimizer step."""
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)
        schedule = get_cosine_schedule_with_warmup(optimizer, 2, 6)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


rows = [encode(json.loads(line)["messages"]) for line in Path(data).read_text("utf-8").splitlines()]
loader = torch.utils.data.DataLoader(rows, 2, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))
lightning.seed_everything(0)
tuner = Tuner()
trainer = lightning.Trainer(
    accelerator="cpu", max_steps=6, accumulate_grad_batches=2, gradient_clip_val=0.3, default_root_dir=output,
    logger=False, enable_checkpointing=False,
)  # fmt: skip
trainer.fit(tuner, loader)
tuner.model.save_pretrained(output)
