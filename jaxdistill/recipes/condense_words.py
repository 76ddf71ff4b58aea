"""Sets of text for classification: learned embeddings put into tokens, or texts a model wrote."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxdistill.dd.perplexity_projection import perplexity_projected
from jaxdistill.dd.synthetic import Synthetic
from jaxdistill.dd.text import filter_generated, generate_texts
from jaxdistill.dd.train_on import train_classifier
from jaxdistill.evals.features import embedding_table
from jaxdistill.mesh import fetch
from jaxdistill.models.classifiers import Classifier
from jaxdistill.models.generate import Sampling
from jaxdistill.models.hub import Model
from jaxdistill.models.token_ids import encode_text
from jaxdistill.recipes.condense_data import Real, read_real
from jaxdistill.recipes.condense_options import Condense
from jaxdistill.train.labelled import Labelled

_WEIGHT = 0.05  # of a nat beside the squared distance, in mean squared lengths of an embedding
_CANDIDATES, _BEAM = 32, 2


def words_alone(synthetic: Synthetic) -> Synthetic:
    """Return a set at the level of text: labels alone, the texts stand beside them."""
    whole = synthetic.batch()
    kept = {name: whole[name] for name in ("labels", "label_logits") if name in whole}
    return Synthetic(learned={}, fixed=kept)


def likely_texts(o: Condense, real: Real, synthetic: Synthetic) -> tuple[str, ...]:
    """Return texts near learned embeddings that the model that read the data finds likely.

    ``--prompt``, with each example's class in it, precedes them. See
    ``dd.perplexity_projection``.
    """
    assert real.model is not None  # says Condense
    model, table = real.model, embedding_table(real.model)
    inputs = np.asarray(synthetic.learned["inputs"])
    labels = np.asarray(synthetic.fixed["labels"])
    ids = perplexity_projected(
        jnp.asarray(inputs) / np.float32(real.reading["scale"]),
        jnp.asarray(table),
        model.apply_fn(),
        model.params,
        weight=_WEIGHT,
        rho=float(1 / np.mean(np.sum(np.square(table), axis=1))),
        candidates=_CANDIDATES,
        beam=_BEAM,
        prefix=_prefix(o, model, [real.data.classes[label] for label in labels]),
        batch_size=o.feature_batch,
    )
    decode = model.text_tokenizer().decode
    shown = np.abs(inputs).max(axis=-1) > 0  # zeros are padding
    return tuple(
        str(decode(row[mask].tolist(), skip_special_tokens=True))
        for row, mask in zip(fetch(ids), shown, strict=True)
    )


def _prefix(o: Condense, model: Model, classes: list[str]) -> jax.Array | None:
    """Return the prompt's tokens for each class, shorter ones filled up by their first token."""
    if o.prompt is None:
        return None
    tokenizer = model.text_tokenizer()
    rows = [encode_text(tokenizer, o.prompt.replace("{label}", c)) for c in classes]
    longest = max(map(len, rows))
    return jnp.asarray([[row[0]] * (longest - len(row)) + row for row in rows], jnp.int32)


def written_set(
    o: Condense, real: Real, net: Classifier, console: Console
) -> tuple[Synthetic, tuple[str, ...]]:
    """Return texts that the model wrote for each class, and their labels.

    A classifier trained on the real data confirms them; duplicates are left out, and diverse ones
    are chosen (``dd.text.filter_generated``).

    Raises:
        UserError: too few are confirmed.
    """
    assert real.model is not None and o.prompt is not None and o.per_class is not None
    names = real.data.classes
    wanted = np.repeat(np.arange(len(names)), o.written).astype(np.int32)
    prompts = [o.prompt.replace("{label}", names[label]) for label in wanted]
    how = Sampling(max_new_tokens=o.seq_len, temperature=1.0)
    with console.status(f"{real.model.source} writes {len(prompts)} texts"):
        made = generate_texts(real.model, prompts, how, batch_size=o.feature_batch, seed=o.seed)
    read = read_real(
        Labelled(labels=wanted, classes=names, texts=made),
        level="features",
        model=real.model,
        batch_size=o.feature_batch,
        reading=real.reading,
        console=console,
    )
    key = jax.random.key(o.seed)
    data = {"inputs": jnp.asarray(real.all_inputs()), "labels": jnp.asarray(real.data.labels)}
    params = jax.jit(
        lambda data: train_classifier(
            net, data, steps=o.expert_steps, rate=1e-3, key=key, batch_size=o.batch_size
        )
    )(data)
    probs = fetch(jax.nn.softmax(net.apply(params, jnp.asarray(read.all_inputs()))))
    rows = filter_generated(read.features, wanted, probs, per_class=o.per_class, names=names)
    labels = jnp.asarray(wanted[rows])
    return Synthetic(learned={}, fixed={"labels": labels}), tuple(made[i] for i in rows)
