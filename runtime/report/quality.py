"""The quality of a run's pipeline, in words: what is lost stands beside what is gained."""

from stageline.runtime import words
from stageline.runtime.bench.records import Quality


def quality(found: Quality) -> str:
    """One sentence: perplexities and agreement, or cosines, on how many texts, beside what."""
    parts = []
    if found.perplexity is not None:
        beside = ""
        if found.reference_perplexity is not None:
            times = found.perplexity / found.reference_perplexity
            beside = f", {times:.3g} times the reference's {found.reference_perplexity:.4g}"
        parts.append(f"perplexity {found.perplexity:.4g}{beside}")
    if found.agreement is not None:
        parts.append(f"the same next token as the reference at {100 * found.agreement:.1f} % of places")
    if found.cosines:
        mean = sum(found.cosines) / len(found.cosines)
        parts.append(f"cosine to the reference {mean:.4f} on average, {min(found.cosines):.4f} at least")
    size = f"{words.counted(found.texts, 'text')}, {found.tokens:,} tokens"
    reference = f". Reference: {found.reference}" if found.reference else ""
    return f"Quality on {size}: {'; '.join(parts)}{reference}."
