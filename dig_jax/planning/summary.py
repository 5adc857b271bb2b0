"""Format a plan as text."""

from collections.abc import Iterator
from typing import Any


def summary(plan: dict[str, Any]) -> str:
    """Format the figures of `dig_jax.planning.plan.plan`."""
    return "\n".join(_lines(plan))


def _lines(plan: dict[str, Any]) -> Iterator[str]:
    mesh = ", ".join(f"{name} {size}" for name, size in plan["mesh"].items() if size > 1) or "one device"
    where = f"{plan['topology']}: {plan['chips']} chips ({mesh})"
    yield f"{plan['model']}, {plan['parameters']:,} parameters, on {where}"
    if plan["chip"]:
        chip = plan["chip"]
        yield (
            f"chip: {chip['flops']['bfloat16'] / 1e12:,.0f} TFLOP/s in bfloat16,"
            f" {chip['bandwidth'] / 1e9:,.0f} GB/s memory, {chip['link'] / 1e9:,.0f} GB/s per link"
            + (f", {chip['devices']} devices" if chip["devices"] > 1 else "")
        )
    else:
        yield "unknown device: its peak rates and memory are unknown, so times and fit are not computed"
    limit = plan["memory_limit"]
    yield from _step("train step", plan["train"], limit, plan)
    if "train_at_largest_batch" in plan:
        best = plan["train_at_largest_batch"]
        yield ""
        if best is None:
            yield "largest batch that fits: none; config.mesh.fsdp and config.model.remat save memory"
        else:
            yield (
                f"largest batch that fits: {best['images_per_device']:,} per device (compiled),"
                f" {best['batch_size']:,} in total"
            )
            if best["batch_size"] != plan["train"]["batch_size"]:
                yield from _step("train step with the largest batch", best, limit, plan)
    if "sampler" in plan:
        sampler = plan["sampler"]
        yield from _step(
            f"sampler ({sampler['sampler']}, {sampler['sampler_steps']} steps)", sampler, limit, plan
        )


def _step(title: str, figures: dict[str, Any], limit: float | None, plan: dict[str, Any]) -> Iterator[str]:
    per_device = f", {figures['images_per_device']:,} per device" if "images_per_device" in figures else ""
    yield ""
    bucket = f" of {figures['bucket']} (the largest bucket)" if "bucket" in figures else ""
    yield f"{title}, {figures['batch_size']:,} images{bucket}{per_device}"
    for name, size in figures.get("memory", {}).items():
        yield _line(name, _binary(size))
    yield _line("memory needed", _binary(figures["memory_needed"])) + _verdict(
        figures["memory_needed"], limit
    )
    if "memory" not in figures:
        return
    flops = sum(figures["flops"].values())
    yield _line("FLOPs", _decimal(flops, "FLOP")) + _over_model(figures, flops, plan)
    yield _line("memory traffic", _decimal(figures["bytes"], "B"))
    for kind, size in figures["collectives"].items():
        yield _line(kind, _decimal(size, "B"))
    if "seconds" not in figures:
        return
    for kind, seconds in figures["seconds"].items():
        yield _line(kind, _decimal(seconds, "s")) + (" (bound)" if kind == figures["bound"] else "")
    rate = f"  at best {figures['images_per_second']:,.4g} images/s"
    if "mfu" in figures:
        rate += (
            f", MFU {figures['mfu']:.1%}; {plan['steps']:,} steps take {figures['days']:,.3g} days,"
            f" {figures['chip_hours']:,.4g} chip-hours"
        )
    yield rate
    if "cost" in figures:
        yield _cost(figures["cost"], plan["price"])


def _cost(cost: dict[str, Any], price: dict[str, Any] | None) -> str:
    """Say what the steps cost at least, at a price per chip and hour."""
    text = f"  {cost['steps']:,} steps take at least {cost['hours']:,.3g} hours"
    if price is None:
        return f"{text}; no list price is known: set config.plan.price to dollars per chip and hour"
    about = ", ".join(filter(None, (price["provider"], price["date"])))
    return f"{text} and cost ${cost['dollars']:,.4g} at ${price['dollars']:.2f} per chip and hour ({about})"


def _line(name: str, amount: str) -> str:
    return f"  {name:<18}{amount:>12}"


def _binary(size: int | float) -> str:
    """Format bytes in GiB, MiB or KiB."""
    power = next((power for power in (3, 2) if size >= 1024**power), 1)
    return f"{size / 1024**power:,.2f} {' KMG'[power]}iB"


def _decimal(amount: int | float, unit: str) -> str:
    """Format an amount with the SI prefix that leaves one to three digits before the point."""
    prefixes = {1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k", 1.0: "", 1e-3: "m", 1e-6: "µ"}
    factor = next((factor for factor in prefixes if amount >= factor), 1e-6)
    return f"{amount / factor:,.2f} {prefixes[factor]}{unit}"


def _verdict(needed: int | float, limit: float | None) -> str:
    if limit is None:
        return ""
    verdict = "fits" if needed <= limit else f"{_binary(needed - limit)} too much"
    return f" of {_binary(limit)}: {verdict}"


def _over_model(figures: dict[str, Any], flops: int, plan: dict[str, Any]) -> str:
    if "images_per_device" not in figures:
        return ""
    devices = plan["chips"] * (plan["chip"]["devices"] if plan["chip"] else 1)
    needed = plan["model_flops_per_image"] * figures["batch_size"] / devices
    return f", {flops / needed:.2f} × the model's FLOPs"
