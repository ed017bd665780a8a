"""A plain script of transformers and peft, as its users write them: python transformers_script.py BASE DATA OUT."""

import json
import sys
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

base, data, output = sys.argv[1:]
set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(base)
stop = tokenizer.convert_tokens_to_ids("<|user|>")


def encode(messages):
    """The prompt and the answer; only the answer and the token that ends it are trained."""
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    answer = [*tokenizer.encode("\n" + messages[-1]["content"], add_special_tokens=False), stop]
    return {"input_ids": [*prompt, *answer], "labels": [*[-100] * len(prompt), *answer]}


rows = [encode(json.loads(line)["messages"]) for line in Path(data).read_text("utf-8").splitlines()]
lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
arguments = TrainingArguments(
    output, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=6, learning_rate=1e-3,
    lr_scheduler_type="cosine", warmup_steps=2, max_grad_norm=0.3, report_to="none", use_cpu=True, save_steps=6,
)  # fmt: skip
model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
trainer = Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer))
trainer.train()
trainer.save_model(output)
