"""Word-count baseline: TF-IDF of words and word pairs, and logistic regression. Seconds to fit, hard to beat.

Source: scikit-learn's TfidfVectorizer and LogisticRegression (https://scikit-learn.org), fitted on the last
user turn of the training rows. It knows no language model.
"""

from __future__ import annotations

from pydantic import Field

from luthier import plugins
from luthier.baselines import Baseline, Task
from luthier.errors import DataError
from luthier.rows import Chat


class Params(plugins.Params):
    words: int = Field(
        default=2, ge=1, le=5, description="up to how many words in a row count as one feature"
    )


def predict(params: Params, task: Task) -> Baseline:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    answers = [row.answer for row in task.train]
    if len(set(answers)) < 2:
        raise DataError(
            "word counts need at least two different answers in the training rows",
            hint="leave this baseline out of `evaluate.baselines`",
        )
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, params.words), sublinear_tf=True),
        LogisticRegression(C=10.0, max_iter=1000, random_state=task.seed),
    )
    model.fit([_text(row) for row in task.train], answers)
    task.tell(1, 1)
    said = [str(answer) for answer in model.predict([_text(row) for row in task.test])]
    return Baseline(
        list(said), f"fitted on {len(answers):,} training rows, words and up to {params.words} in a row"
    )


def _text(row: Chat) -> str:
    return row.prompt[-1].content
