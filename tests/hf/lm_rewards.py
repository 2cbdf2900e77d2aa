"""Rewards as a user would write them, named on command lines of the tests."""


def length(prompts, completions, **columns):
    return [float(len(completion)) for completion in completions]


def shorter_and_ended(prompts, completions, finished):
    return [100.0 * ended - len(completion) for completion, ended in zip(completions, finished, strict=True)]


def too_few(prompts, completions, **columns):
    return [0.0]


def not_finite(prompts, completions, **columns):
    return [float("nan")] * len(completions)


async def later(prompts, completions, **columns):
    return [0.0] * len(completions)
