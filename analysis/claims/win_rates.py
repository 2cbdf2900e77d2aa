"""The paper's tables of win rates, which need models that are not part of this project."""

from analysis.claims.base import Claim

WIN_RATE_COLUMNS = ("method", "RM vs SFT", "RM vs chosen", "GPT-4 vs SFT", "GPT-4 vs chosen")
WIN_RATES = {
    "TL;DR summarisation": (
        ("DPO-pref", 68.3, 23.7, 57.0, 30.5),
        ("EXO-pref", 92.5, 60.1, 83.0, 55.0),
        ("Best-of-N (128)", 99.3, 75.8, 83.5, 60.0),
        ("PPO", 93.2, 58.3, 77.0, 52.0),
        ("DPO-rw", 82.7, 39.8, 70.0, 41.0),
        ("EXO-rw", 97.3, 76.4, 88.5, 64.0),
    ),
    "Anthropic-HH (helpfulness) dialogue": (
        ("DPO-pref", 66.3, 65.1, 58.0, 37.0),
        ("EXO-pref", 76.4, 76.7, 73.0, 51.0),
        ("Best-of-N (128)", 94.6, 98.2, 86.0, 63.0),
        ("PPO", 75.0, 74.0, 66.5, 52.0),
        ("DPO-rw", 79.9, 81.3, 75.5, 49.0),
        ("EXO-rw", 85.6, 87.2, 83.5, 60.0),
    ),
}


CLAIMS = (
    Claim(
        "C15",
        "TL;DR, Anthropic-HH and instruction following: EXO above DPO and PPO, on par with Best-of-128",
        "Section 4, tables of win rates",
        paper_value="tables below",
        why_not="needs the data sets, the weights of the authors' models and GPT-4 as a judge",
    ),
)
