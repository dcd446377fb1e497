"""``python -m rat_ext.train run``: pretraining, and fine-tuning with ``--sft``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from ._extra import check_vocabulary, need, one_line, read_json, write_json, wrong
from .config import Run, model_config
from .data import Tokens, Windows

# What changes no number of a run: these may differ where it goes on.
FREE = ("micro_batch", "compile", "checkpointing", "fsdp", "log_every", "save_every", "keep", "eval_every", "eval_windows")


def main_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def say(text: str) -> None:
    """Prints, on the main process."""
    if main_process():
        print(text, flush=True)


def device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def shares(windows: int, micro: int, ranks: int) -> int:
    """Micro-batches that a rank takes in a step of ``windows``."""
    if windows % (micro * ranks):
        raise wrong(
            "run",
            "train.tokens_per_step",
            f"windows that divide by micro_batch x ranks = {micro} x {ranks}",
            f"{windows} windows",
        )
    return windows // (micro * ranks)


def warm_up(share: float, steps: int) -> int:
    """Steps that warm up, rounded up. The first has a rate of 0, so a run of one step has none: it would learn nothing."""
    return min(math.ceil(share * steps), steps - 1)


def arguments(run: Run, section: Any, **own: Any) -> dict[str, Any]:
    """Arguments of TrainingArguments that both kinds of training share; section [trainer] comes last."""
    bf16 = section.bf16 if section.bf16 is not None else torch.cuda.is_available()
    found: dict[str, Any] = {
        "output_dir": str(run.output),
        "per_device_train_batch_size": section.micro_batch,
        "learning_rate": section.learning_rate,
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.clip,
        "logging_steps": section.log_every,
        # Nothing makes the host wait for a GPU between two lines of the log: no look at each loss, no copy that waits.
        "logging_nan_inf_filter": False,
        "accelerator_config": {"non_blocking": torch.cuda.is_available()},
        "save_strategy": "steps",
        "save_steps": section.save_every,
        "bf16": bf16,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": section.checkpointing,
        "seed": section.seed,
        "data_seed": section.seed,
        "report_to": "none",
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
    }
    if section.fsdp:
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        if ranks == 1 or not torch.cuda.is_available():
            raise wrong("run", "fsdp", "GPUs, under torchrun", f"{ranks} rank(s) on {device().type}")
        found |= {
            "fsdp": True,
            "fsdp_config": {
                "transformer_layer_cls_to_wrap": ["RATDecoderLayer"],
                "state_dict_type": "SHARDED_STATE_DICT",
                "activation_checkpointing": section.checkpointing,
            },
            "gradient_checkpointing": False,
        }
    merged = found | own | run.trainer
    if isinstance(config := merged["accelerator_config"], dict):  # else it names a file
        merged["accelerator_config"] = found["accelerator_config"] | config
    return merged


def make(kind: Any, found: dict[str, Any]) -> Any:
    """A TrainingArguments, or one line on what is wrong with section [trainer]."""
    fields = {f.name for f in dataclasses.fields(kind)}
    if unknown := sorted(set(found) - fields):
        raise wrong("run", f"trainer.{unknown[0]}", f"an argument of {kind.__name__}", "an unknown key")
    try:
        args = kind(**found)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise wrong("run", "[trainer] and the recipe", f"what {kind.__name__} takes", one_line(error)) from None
    args._n_gpu = min(args.n_gpu, 1)  # of several GPUs without torchrun, Trainer would make a DataParallel
    if args.device.type == "cpu":
        vars(args)["_setup_devices"] = torch.device("cpu")  # a rank is on "cpu:0", where torch.load cannot put an optimizer
    return args


def claim(run: Run, identity: dict[str, Any]) -> None:
    """Makes the output folder that of this run, or says what it holds instead."""
    marker = run.output / "run.json"
    if marker.exists():
        there = read_json(marker, "run", "output")
        different = sorted(key for key in identity.keys() | there.keys() if identity.get(key) != there.get(key))
        if different:
            key = different[0]
            expected = f"{key} as in {marker}: {there.get(key)} (or another output)"
            raise wrong("run", "output", expected, identity.get(key))
    if not main_process():
        return
    try:
        run.output.mkdir(parents=True, exist_ok=True)
        for left in run.output.glob(".*.tmp"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        if not marker.exists():
            write_json(marker, identity)
    except OSError as error:
        raise wrong("run", "output", "a folder that can be written", f"{run.output}: {error.strerror}") from None


def load_model(run: Run, vocab: int, eos: int) -> Any:
    """A new model of section [model], or that of its path; float32."""
    from ..models import RATForCausalLM

    if "path" in run.model:
        kind = need("transformers", "train", "run").AutoModelForCausalLM
        try:
            return kind.from_pretrained(run.model["path"], dtype=torch.float32)
        except Exception as error:  # safetensors, pickle and each configuration have kinds of their own
            raise wrong("run", "model.path", f"a model ({one_line(error)})", run.model["path"]) from None
    from transformers import set_seed

    set_seed(run.train.seed)
    return RATForCausalLM(model_config(run, vocab, eos))


def load_tokenizer(folder: Path, argument: str) -> Any:
    """The tokenizer in a folder."""
    try:
        return need("transformers", "train", "run").AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise wrong("run", argument, f"a folder with a tokenizer ({one_line(error)})", folder) from None


# ---- pretraining --------------------------------------------------------------------------------------------------------


def dry_run(run: Run, config: Any, windows: int, ranks: int) -> None:
    """Says what the run needs, before any of it: on a GPU after one micro-batch of it, else by arithmetic."""
    from . import flops

    recipe, where = run.train, device()
    total, products = flops.parameters(config)
    per_token = flops.flops_per_token(config, recipe.length)
    bf16 = recipe.bf16 if recipe.bf16 is not None else where.type == "cuda"
    tokens = recipe.micro_batch * recipe.length
    memory = flops.step_memory(config, tokens, ranks=ranks if recipe.fsdp else 1, checkpointing=recipe.checkpointing, bf16=bf16)
    top, source = flops.peak(where)
    tokens_in_all, rate = recipe.steps * recipe.tokens_per_step, per_token / 1e9
    print(f"model        {total / 1e6:.1f} M parameters, {products / 1e6:.1f} M in products; {rate:.3g} GFLOP per token")
    print(f"run          {recipe.steps:,} steps of {recipe.tokens_per_step:,} tokens, {tokens_in_all:,} in all")
    rounds = tokens_in_all / recipe.length / windows
    print(f"data         {windows:,} windows of {recipe.length} tokens, each is seen {rounds:.2f} times")
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory.items())
    print(f"memory       about {sum(memory.values()) / 1e9:.2f} GB per rank ({parts}), micro-batch of {recipe.micro_batch}")
    print(f"device       {where}: {top / 1e12:.3g} TFLOP per second ({source}); {ranks} rank(s)")
    whole = tokens_in_all * per_token / top / ranks
    if where.type == "cuda":
        seconds, used = _measure(run, config, where, bf16)
        rate = tokens / seconds
        print(
            f"measured     {seconds:.3f} s per micro-batch, {rate:,.0f} tokens/s, MFU {rate * per_token / top:.1%}, "
            f"{used / 1e9:.2f} GB"
        )
        print(f"time         {_duration(tokens_in_all / rate / ranks)}, saving and evaluating left out")
    else:
        print(f"time         {_duration(whole / 0.4)} at 40 % of the device's rate, {_duration(whole)} at all of it")


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def _measure(run: Run, config: Any, where: torch.device, bf16: bool) -> tuple[float, float]:
    """Seconds of a micro-batch and bytes at its peak, with gradients and moments in place."""
    import time

    from ..models import RATForCausalLM

    recipe = run.train
    model = RATForCausalLM(config).to(where).train()
    if recipe.checkpointing:
        model.gradient_checkpointing_enable()
    call = torch.compile(model) if recipe.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    inputs = torch.randint(config.vocab_size, (recipe.micro_batch, recipe.length), device=where)
    best = math.inf
    for _ in range(4):
        torch.cuda.synchronize(where)
        begin = time.perf_counter()
        with torch.autocast(where.type, torch.bfloat16, enabled=bf16):
            loss = call(input_ids=inputs, labels=inputs, shift_labels=inputs).loss
        loss.backward()
        torch.cuda.synchronize(where)
        best = min(best, time.perf_counter() - begin)
        optimizer.step()
        optimizer.zero_grad()
    return best, torch.cuda.max_memory_allocated(where)


def pretrain(run: Run, *, dry: bool = False, save: bool = True) -> dict:
    """Trains by sections [model] and [train] on shards of ``prepare``. Goes on from the newest checkpoint of ``output``.

    Args:
        run: the file.
        dry: only say what the run needs.
        save: write the model and the plot at the end.

    Returns:
        What the last evaluation found, and the folder of the model where it was saved.
    """
    transformers = need("transformers", "train", "run")
    need("accelerate", "train", "run")
    import rat_ext.models  # noqa: F401  (registers its classes)

    transformers.utils.logging.disable_progress_bar()
    from . import flops

    if run.lora is not None:
        raise wrong("run", "lora", "--sft: adapters are for fine-tuning", "pretraining")
    if run.data is None:
        raise wrong("run", "data", "a folder that `python -m rat_ext.train prepare` made", "none")
    recipe, tokens = run.train, Tokens(run.data)
    windows = recipe.tokens_per_step // recipe.length
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    data = Windows(tokens, recipe.length, 0, recipe.seed if recipe.shuffle else None)
    if not recipe.steps:
        recipe.steps = max(1, data.windows // windows)  # each window once
    accumulate = shares(windows, recipe.micro_batch, ranks)
    data.items = recipe.steps * windows
    vocab = int(tokens.index["vocab"])
    if "path" in run.model:
        try:
            config = transformers.AutoConfig.from_pretrained(run.model["path"])
        except Exception as error:
            raise wrong("run", "model.path", f"a model ({one_line(error)})", run.model["path"]) from None
        if config.model_type != "rat":
            raise wrong("run", "model.path", "a model of rat_ext, to go on with pretraining", config.model_type)
    else:
        config = model_config(run, vocab, tokens.eos)
    if config.vocab_size < vocab:
        raise wrong("run", "model.vocab_size", f"at least the data's, {vocab}", config.vocab_size)
    if dry:
        if main_process():
            dry_run(run, config, data.windows, ranks)
        return {}
    from .trainer import Pretrainer

    held = Tokens(run.data, "validation")
    held_out = Windows(held, recipe.length) if len(held) > 1 and recipe.eval_every else None
    if held_out is not None and recipe.eval_windows:
        held_out.items = min(held_out.items, recipe.eval_windows)
    fixed = {f"train.{key}": value for key, value in dataclasses.asdict(recipe).items() if key not in FREE}
    claim(run, {"data": tokens.index["hash"], "model": run.model} | fixed)
    args = make(
        transformers.TrainingArguments,
        arguments(
            run, recipe, max_steps=recipe.steps, gradient_accumulation_steps=accumulate, adam_beta1=recipe.betas[0],
            adam_beta2=recipe.betas[1], warmup_steps=warm_up(recipe.warmup, recipe.steps),
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr": recipe.min_learning_rate}, torch_compile=recipe.compile,
            eval_strategy="steps" if held_out is not None else "no", eval_steps=recipe.eval_every or None,
            per_device_eval_batch_size=recipe.micro_batch, train_sampling_strategy="sequential", dataloader_drop_last=True,
            remove_unused_columns=False, prediction_loss_only=True,
        ),
    )  # fmt: skip
    model = load_model(run, vocab, tokens.eos)
    tokenizer = load_tokenizer(run.data / "tokenizer", "data")
    trainer = Pretrainer(
        model=model, args=args, train_dataset=data, eval_dataset=held_out, held_out=held_out, packed=recipe.packed,
        flops=flops.flops_per_token(config, recipe.length), peak=flops.peak(args.device)[0], keep=recipe.keep,
    )  # fmt: skip
    return _train(run, trainer, tokenizer, save)


def _train(run: Run, trainer: Any, tokenizer: Any, save: bool = True) -> dict:
    """Trains from the newest checkpoint on, writes the model and the plot if ``save``."""
    from .plot import plot_loss
    from .trainer import checkpoints, publish

    found = checkpoints(run.output)
    trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
    # Before the plot, which shows it.
    result = trainer.evaluate() if getattr(trainer, "held_out", None) is not None else {}
    if not save:
        return result
    path, temporary = run.output / "model", run.output / ".model.tmp"
    if run.lora is not None and not run.lora.merge:
        path = run.output / "adapter"
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # every rank takes part
    if trainer.args.should_save:
        shutil.rmtree(temporary, ignore_errors=True)
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_torch_compile=False)
        model.save_pretrained(temporary, state_dict=state)
        tokenizer.save_pretrained(temporary)
        if run.lora is not None and run.lora.merge:
            publish(temporary, run.output / "adapter")
            _merge(run, temporary)
            tokenizer.save_pretrained(temporary)
        publish(temporary, path)
        if problem := plot_loss(run.output):
            print(problem, file=sys.stderr)
        print(f"model: {path}", flush=True)
    trainer.accelerator.wait_for_everyone()
    return result | {"model": str(path)}


def _merge(run: Run, folder: Path) -> None:
    """The model with the adapters of ``output/adapter`` added to its weights."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_model(run, 0, 0), str(run.output / "adapter"))
    model.merge_and_unload().save_pretrained(folder)


# ---- fine-tuning --------------------------------------------------------------------------------------------------------


def encodable(text: str) -> bool:
    """Whether a text is UTF-8; JSON can hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_examples(path: Path, tokenizer: Any, length: int) -> tuple[list[dict[str, str]], list[str]]:
    """Prompts and answers of a JSON-lines file, and why lines of it were left out."""
    found, skipped = [], []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise wrong("run", "--sft", "a file that can be read", f"{path}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            prompt, answer = item["prompt"], item["answer"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            skipped.append(f"{path.name}:{number}: expected an object with prompt and answer ({type(error).__name__}: {error})")
            continue
        if not isinstance(prompt, str) or not isinstance(answer, str) or not answer:
            skipped.append(f"{path.name}:{number}: prompt and answer: expected strings, the answer not empty")
        elif not encodable(prompt + answer):
            skipped.append(f"{path.name}:{number}: prompt and answer: expected text, got half of a surrogate pair")
        elif len(tokenizer(prompt, add_special_tokens=False).input_ids) >= length:
            skipped.append(f"{path.name}:{number}: prompt: expected less than sft.length = {length} tokens")
        else:
            found.append({"prompt": prompt, "completion": answer})
    if not found:
        raise wrong("run", "--sft", "lines with prompt and answer", f"none in {path}" + (f" ({skipped[0]})" if skipped else ""))
    return found, skipped


def _dry_finetune(run: Run, model: Any, tokenizer: Any, examples: list[dict[str, str]], ranks: int) -> None:
    """Says what fine-tuning needs in memory and time, by arithmetic."""
    from . import flops

    recipe, where = run.sft, device()
    texts = [item["prompt"] + item["completion"] for item in examples]
    sizes = [min(len(ids) + 1, recipe.length) for ids in tokenizer(texts, add_special_tokens=False).input_ids]
    longest, tokens = max(sizes), sum(sizes) * recipe.epochs
    bf16 = recipe.bf16 if recipe.bf16 is not None else where.type == "cuda"
    options: dict[str, Any] = {"checkpointing": recipe.checkpointing, "bf16": bf16, "ranks": ranks if recipe.fsdp else 1}
    memory = flops.step_memory(model.config, recipe.micro_batch * longest, **options)
    if run.lora is not None:  # gradients and moments are those of the adapters alone
        layers = [m for name, m in model.named_modules() if name.rpartition(".")[2] in run.lora.modules]
        adapters = sum(run.lora.r * sum(m.weight.shape) for m in layers if isinstance(m, torch.nn.Linear))
        weights = (4 * flops.parameters(model.config)[0] + 16 * adapters) / options["ranks"]
        memory = {"weights, adapters": weights} | dict(list(memory.items())[1:])
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory.items())
    print(f"memory       about {sum(memory.values()) / 1e9:.2f} GB per rank ({parts}), micro-batch of {recipe.micro_batch}")
    top, source = flops.peak(where)
    whole = tokens * flops.flops_per_token(model.config, longest) / top / ranks
    print(f"device       {where}: {top / 1e12:.3g} TFLOP per second ({source}); {ranks} rank(s)")
    print(f"time         {_duration(whole / 0.4)} at 40 % of the device's rate, {_duration(whole)} at all of it")


def finetune(run: Run, file: Path, *, dry: bool = False) -> dict:
    """Fine-tunes the model of ``model.path`` on prompts and answers, by section [sft]; the loss is of the answers alone.

    Returns:
        The folder of the model.
    """
    transformers, trl = need("transformers", "train", "run"), need("trl", "train", "run --sft")
    datasets = need("datasets", "train", "run --sft")
    import rat_ext.models  # noqa: F401  (registers its classes)

    transformers.utils.logging.disable_progress_bar()
    peft_config = None
    if run.lora is not None:
        lora = run.lora
        peft_config = need("peft", "train", "[lora]").LoraConfig(
            r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.modules, task_type="CAUSAL_LM"
        )
    if "path" not in run.model:
        raise wrong("run", "model", "path, to fine-tune from", ", ".join(run.model))
    model = load_model(run, 0, 0)
    if run.lora is not None:
        names = [name for name, _ in model.named_modules()]
        for module in run.lora.modules:
            if not any(name == module or name.endswith("." + module) for name in names):
                raise wrong("run", "lora.modules", f"names of modules of the model, such as {names[-2]}", module)
    recipe = run.sft
    tokenizer = load_tokenizer(Path(run.model["path"]), "model.path")
    check_vocabulary("run", "model.path", tokenizer, model.config)
    examples, skipped = read_examples(file, tokenizer, recipe.length)
    for problem in skipped[:20]:
        say(f"skipped {problem}")
    say(f"{len(examples):,} examples, {len(skipped):,} lines skipped")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if recipe.batch % (recipe.micro_batch * ranks):
        raise wrong("run", "sft.batch", f"a multiple of micro_batch x ranks = {recipe.micro_batch} x {ranks}", recipe.batch)
    steps = math.ceil(math.ceil(len(examples) / recipe.batch) * recipe.epochs)
    if dry:
        say(f"{steps:,} steps of {recipe.batch} examples of up to {recipe.length} tokens")
        if main_process() and model.config.model_type == "rat":  # what others need is not known here
            _dry_finetune(run, model, tokenizer, examples, ranks)
        return {}
    lora_section = dataclasses.asdict(run.lora) if run.lora else None
    fixed = {f"sft.{key}": value for key, value in dataclasses.asdict(recipe).items() if key not in FREE}
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    claim(run, {"sft": digest, "model": run.model, "lora": lora_section} | fixed)
    from .trainer import finetuner

    args = make(
        trl.SFTConfig,
        arguments(
            run, recipe, num_train_epochs=recipe.epochs,
            gradient_accumulation_steps=recipe.batch // (recipe.micro_batch * ranks),
            warmup_steps=warm_up(recipe.warmup, steps), lr_scheduler_type="cosine", max_length=recipe.length,
            completion_only_loss=True, dataset_num_proc=None,
        ),
    )  # fmt: skip
    trainer = finetuner()(
        model=model, args=args, train_dataset=datasets.Dataset.from_list(examples), processing_class=tokenizer,
        peft_config=peft_config,
    )  # fmt: skip
    trainer.set_up(recipe.keep)
    return _train(run, trainer, tokenizer)
