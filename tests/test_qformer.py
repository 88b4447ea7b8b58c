"""The Q-Former: three tables on one set of weights, keys that are kept, and the published numbers.

Its laws take the class, so that tests/bugs/masks.py can hold them to Q-Formers with a mistake.
"""

import copy

import pytest
import torch
from torch.nn.functional import cosine_similarity

from minivlp.decoder import decode
from minivlp.masks import influence, visible
from minivlp.mlm import mlm_loss
from minivlp.models.published import names
from minivlp.models.qformer import TABLES, Captioner, Qformer, QformerConfig, load_qformer
from minivlp.targets import next_words
from tests.laws import Subject, law
from tests.peers import torchmultimodal_qformer

SIZES = dict(
    vocab_size=40, max_text_len=9, queries=5, dim=24, layers=4, heads=3, hidden=40, image_dim=20, embed=12
)
Q, L, N = 5, 7, 6


def moved(model):
    """A model whose parameters all matter: near 0, where they start, mistakes hide."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if not name.endswith("log_scale"):
            parameter.data += torch.randn(parameter.shape) * 0.3
    return model.eval().requires_grad_(False)


def made(f=Qformer, **changes):
    torch.manual_seed(0)
    return moved(f(QformerConfig(**SIZES | changes))).double()


def batch(B=3):
    """Texts of different lengths and the states of pictures, of which one is padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 40, (B, L), generator=generator)
    mask = torch.arange(L) < torch.tensor([L, 4, 2])[:B, None]
    image = torch.randn(B, N, 20, generator=generator, dtype=torch.float64)
    seen = torch.arange(N) < torch.tensor([N, N, 4])[:B, None]
    return ids * mask, mask, image, seen


def depends(function, x):
    """Which rows of function(x) depend on which rows of x (1, L, D): autograd's Jacobian, exactly not 0."""
    jacobian = torch.autograd.functional.jacobian(function, x, vectorize=True)  # (1, L', D', 1, L, D)
    return (jacobian.abs().sum((0, 2, 3, 5)) > 0).numpy()


def losses(model, ids, mask, image):
    """Of the three tables, each with its scores."""
    x, y = model.encode(ids, mask, image, "contrast")
    words = model.encode(ids, mask, image, "captions")[1]
    labels = torch.from_numpy(next_words(ids.numpy(), mask.numpy()))
    asked = labels >= 0
    caption = mlm_loss(model.mlm_hidden(words[asked]), model.mlm_weight, model.mlm_bias, labels[asked])
    return {
        "contrast": model.contrast_loss(x, y),
        "captions": caption,
        "matching": model.itm_logits(model.encode(ids, mask, image, "matching")[0])
        .log_softmax(1)[:, 1]
        .mean(),
    }


def given(rows, model, function):
    """function() with these rows (B, Q + L, D) for the queries and words that the stack is given."""
    handle = model.norm.register_forward_pre_hook(lambda module, inputs: (rows,))
    try:
        return function()
    finally:
        handle.remove()


@law("qformer", hint="Row i of the states depends on row j exactly where a path of looks leads from i to j.")
def three_tables_on_one_set_of_weights(f):
    model, (ids, mask, image, _) = made(f.function, layers=2), batch(1)
    rows = torch.randn(1, Q + L, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for table, (sees, causal) in TABLES.items():
        run = lambda: torch.cat(model.encode(ids, mask, image, table), 1)  # noqa: B023, E731, called here
        got = depends(lambda rows: given(rows, model, run), rows)  # noqa: B023
        wanted = influence(visible((Q, L), sees, causal), 2)
        assert (got == wanted).all(), f"{table}: a row depends on what it may not see, or on less than it may"


@law("qformer", hint="Cross-attention is for the queries alone, in layers 0, every, 2 · every, …")
def words_learn_of_the_picture_through_queries(f):
    ids, mask, image, _ = batch()
    other = image + 1.0
    for layers, first in ((1, False), (2, True)):
        model = made(f.function, layers=layers)
        for table in TABLES:
            (x, y), (x2, y2) = (model.encode(ids, mask, z, table) for z in (image, other))
            assert (x - x2).abs().max() > 1e-3, "the queries do not look at the picture"
            moves = bool((y - y2).abs().max() > 0)
            assert moves == (first and table != "contrast"), (
                f"{table}, {layers} layers: a word's look is wrong"
            )
    weights = {name for name in made(f.function, layers=5, every=2).state_dict() if ".kv.weight" in name}
    assert weights == {f"layers.{i}.kv.weight" for i in (0, 2, 4)}


@law("qformer", hint="Under the table of contrast no word's state has a gradient by the picture: exactly 0.")
def words_of_contrast_have_no_gradient_by_the_picture(f):
    model, (ids, mask, image, _) = made(f.function), batch()
    image.requires_grad_()
    words = model.encode(ids, mask, image, "contrast")[1]
    if words.requires_grad:
        (gradient,) = torch.autograd.grad(words.square().sum(), image, allow_unused=True)
        assert gradient is None or not gradient.any(), "a word was told of the picture"
    alone = model.read_words(ids, mask)
    assert torch.allclose(words[mask], alone[mask], atol=1e-10), "towers are not separate passes"


@law("qformer", hint="Queries see queries only: their keys can be kept, and words read over them later.")
def one_pass_equals_the_cached_pass(f):
    model, (ids, mask, image, seen) = made(f.function), batch()
    queries, words = model.encode(ids, mask, image, "captions", seen)
    alone, kept = model.read(image, seen)
    assert torch.allclose(queries, alone, atol=1e-10), "queries of captions are not the queries alone"
    later, more = model.write(ids, mask, kept)
    assert torch.allclose(words[mask], later[mask], atol=1e-10), (
        "words over kept keys are not those of one pass"
    )
    assert [k.shape[2] for k, _ in kept] == [Q] * 4 and [k.shape[2] for k, _ in more] == [Q + L] * 4
    steps = []
    for word in ids[:1].unbind(1):  # one word after the other, of the text that has no padding
        state, kept = model.write(word[:, None], mask[:1, :1], [[z[:1] for z in pair] for pair in kept])
        steps.append(state)
    assert torch.allclose(torch.cat(steps, 1), words[:1], atol=1e-10), "word by word is not one pass"


@law("qformer", hint="Queries have no places: in another order they give the same rows in that order.")
def queries_have_no_order(f):
    model, (ids, mask, image, _) = made(f.function), batch()
    order = torch.tensor([3, 0, 4, 1, 2])
    before = {table: model.encode(ids, mask, image, table) for table in TABLES}
    scores = losses(model, ids, mask, image)
    model.query.data = model.query.data[order]
    for table, (x, y) in before.items():
        x2, y2 = model.encode(ids, mask, image, table)
        assert torch.allclose(x2, x[:, order], atol=1e-10) and torch.allclose(y2[mask], y[mask], atol=1e-10)
    for name, score in losses(model, ids, mask, image).items():
        assert torch.allclose(score, scores[name], atol=1e-10), f"{name} depends on the order of the queries"


@law("qformer", hint="A picture is as near as its nearest query: saying a query twice changes nothing.")
def contrast_is_unchanged_by_a_query_twice(f):
    model, (ids, mask, image, _) = made(f.function), batch()
    x, y = model.encode(ids, mask, image, "contrast")
    for i in range(Q):
        twice = torch.cat([x, x[:, i : i + 1]], 1)
        assert torch.allclose(model.similarity(twice, y), model.similarity(x, y), atol=1e-12)


@law(
    "qformer",
    hint="The largest cosine of a picture's queries with the text's first word; InfoNCE over pairs.",
)
def scores_are_the_loops(f):
    model, (ids, mask, image, _) = made(f.function), batch()
    x, y = model.encode(ids, mask, image, "contrast")
    p, q = model.image_project(x), model.text_project(y[:, 0])
    wanted = torch.stack([torch.stack([cosine_similarity(a, b[None]).max() for b in q]) for a in p])
    assert torch.allclose(model.similarity(x, y), wanted, atol=1e-10), "the similarity is another"
    assert model.similarity(x[:1], y[:1]).shape == (1, 1), "a batch of one lost an axis"
    S, pairs = model.scale * wanted, torch.arange(3)
    loss = sum(torch.nn.functional.cross_entropy(scores, pairs) for scores in (S, S.T)) / 2
    assert torch.allclose(model.contrast_loss(x, y), loss, atol=1e-10), "the loss is another"
    x, _ = model.encode(ids, mask, image, "matching")
    logits = sum(x[:, i] @ model.itm.weight.T + model.itm.bias for i in range(Q)) / Q
    assert torch.allclose(model.itm_logits(x), logits, atol=1e-10), "the mean over queries is another"


@law("qformer", hint="Neither what stands at padding nor how much there is may show in any real row.")
def padding_changes_nothing(f):
    model, (ids, mask, image, seen) = made(f.function), batch()
    for table in TABLES:
        x, y = model.encode(ids, mask, image, table, seen)
        other = model.encode(
            torch.where(mask, ids, 7), mask, image.masked_fill(~seen[..., None], 9.0), table, seen
        )
        assert torch.equal(x, other[0]) and torch.equal(y[mask], other[1][mask]), f"{table}: padding shows"
        for b, (words, patches) in enumerate(zip(mask.sum(1).tolist(), seen.sum(1).tolist(), strict=True)):
            row = slice(b, b + 1)
            alone = model.encode(ids[row, :words], mask[row, :words], image[row, :patches], table)
            assert torch.allclose(alone[0], x[row], atol=1e-10)
            assert torch.allclose(alone[1], y[row, :words], atol=1e-10), (
                f"{table}: a text alone reads otherwise"
            )


LAWS_OF_IT = [
    three_tables_on_one_set_of_weights, words_learn_of_the_picture_through_queries,
    words_of_contrast_have_no_gradient_by_the_picture, one_pass_equals_the_cached_pass, queries_have_no_order,
    contrast_is_unchanged_by_a_query_twice, scores_are_the_loops, padding_changes_nothing,
]  # fmt: skip


@pytest.mark.parametrize("one", LAWS_OF_IT, ids=lambda one: one.__name__)
def test_laws(one):
    one(Subject(Qformer, "plain"))


def test_every_part_learns():
    """The three losses together reach every weight, and queries learn from each of them."""
    model, (ids, mask, image, _) = made().requires_grad_(True), batch()
    for name, loss in losses(model, ids, mask, image).items():
        model.query.grad = None
        loss.backward()
        assert (model.query.grad.abs().sum(1) > 0).any(), f"no query learns from {name}"
    still = [
        name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()
    ]
    assert not still, f"these learn nothing: {still}"


def test_it_writes_with_a_cache_as_without():
    model, (_, _, image, _) = made(), batch()
    _, kept = model.read(image[:1])
    ids = torch.tensor([[1]])
    for _ in range(4):
        words, _ = model.write(ids, torch.ones_like(ids, dtype=torch.bool), kept)
        ids = torch.cat([ids, model.mlm_logits(words[:, -1]).argmax(-1, keepdim=True)], 1)
    for beams in (1, 3):
        found, _ = decode(Captioner(model, kept), ids[:, :1], torch.ones(4, 40).bool(), beams=beams)
        assert beams > 1 or torch.equal(found, ids[:, 1:])


def test_bfloat16():
    model, (ids, mask, image, seen) = made(), batch()
    wanted = {table: model.encode(ids, mask, image, table, seen) for table in TABLES}
    wanted["scores"] = model.similarity(*wanted["contrast"])
    model = model.bfloat16()
    for table in TABLES:
        found = model.encode(ids, mask, image.bfloat16(), table, seen)
        assert all(x.dtype == torch.bfloat16 for x in found)
        assert (found[0].double() - wanted[table][0]).abs().mean() < 0.03
        if table == "contrast":
            scores = model.similarity(*found)
            assert scores.dtype == torch.bfloat16 and (scores.double() - wanted["scores"]).abs().max() < 0.05


def test_bad_input_is_refused_in_one_sentence():
    model, (ids, mask, image, seen) = made(), batch()
    for call, message in (
        (
            lambda: model.encode(ids, mask, image, "itc"),
            "table must be one of contrast, captions, matching, got",
        ),
        (lambda: model.encode(ids, mask, image[:2], "matching"), "image must have shape"),
        (lambda: model.encode(ids + 40, mask, image, "matching"), r"ids must lie in \[0, 40\)"),
        (
            lambda: model.encode(ids, mask.flip(1), image, "contrast"),
            "text_mask must be True at the first word",
        ),
        (lambda: model.encode(ids, mask, image, "contrast", ~mask), "image_mask must have shape"),
        (lambda: model.read(image[..., :3]), r"image must have shape \(B, N, 20\)"),
        (lambda: model.read(image * torch.nan), "image must not contain NaN"),
        (lambda: model.read(image, seen & False), "image_mask must have a True in every row"),
        (
            lambda: model.write(ids, mask, model.write(ids, mask, model.read(image)[1])[1]),
            "must have 1 to 2 words",
        ),
        (
            lambda: made(vocab_size=0).read_words(ids, mask),
            "model must have words, got a configuration without",
        ),
        (
            lambda: made(embed=0).itm_logits(image),
            "model must have the itm head, got a configuration without it",
        ),
        (lambda: made(captions=False).mlm_logits(image), "model must have the mlm head"),
        (lambda: QformerConfig(heads=5), "heads must divide dim=768, got 5"),
        (lambda: QformerConfig(every=0), "every must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# The published numbers

FACE = dict(
    vocab_size=40, hidden_size=24, num_hidden_layers=4, num_attention_heads=3, intermediate_size=40,
    max_position_embeddings=9, encoder_hidden_size=20, use_qformer_text_input=True,
)  # fmt: skip


def face(**changes):
    """Hugging Face's stack alone."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    return moved(transformers.Blip2QFormerModel(transformers.Blip2QFormerConfig(**FACE | changes)))


def retrieval():
    """Hugging Face's BLIP-2 that compares and matches; its picture encoder is of no matter."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    vision = dict(hidden_size=20, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2)
    vision |= dict(image_size=28, patch_size=14)
    config = transformers.Blip2Config(
        vision_config=vision, qformer_config=FACE, num_query_tokens=5, image_text_hidden_size=12
    )
    torch.manual_seed(0)
    return moved(transformers.Blip2ForImageTextRetrieval(config))


def single(*arrays):
    return [x.float() if x.is_floating_point() else x for x in arrays]


@pytest.mark.parametrize("changes", [{}, {"cross_attention_frequency": 3}, {"num_hidden_layers": 1}], ids=str)
@pytest.mark.parametrize("text", [False, True])
def test_states_are_hugging_faces(changes, text):
    """The stack alone: queries; queries and words that see one another; words; padding on both sides."""
    theirs, (_, mask, image, seen) = face(use_qformer_text_input=text, **changes), single(*batch())
    ours = load_qformer(theirs.state_dict(), heads=3)
    rows = torch.randn(3, Q + L, 24)
    queries = rows[:, :Q]
    wanted = theirs(
        queries, encoder_hidden_states=image, encoder_attention_mask=seen.long()
    ).last_hidden_state
    assert torch.allclose(ours.run(queries, Q, image, seen), wanted, atol=1e-5) and wanted.std() > 0.3
    if text:
        real = torch.cat([torch.ones(3, Q, dtype=torch.bool), mask], 1)
        together = dict(query_length=Q, attention_mask=real.long(), encoder_hidden_states=image)
        wanted = theirs(rows, **together).last_hidden_state
        found = ours.run(rows, Q, image, mask=real[:, None, None])
        assert torch.allclose(found[real], wanted[real], atol=1e-5)
        wanted = theirs(rows[:, Q:], query_length=0, attention_mask=mask.long()).last_hidden_state
        assert torch.allclose(
            ours.run(rows[:, Q:], 0, mask=mask[:, None, None])[mask], wanted[mask], atol=1e-5
        )


@torch.no_grad()
def test_scores_are_hugging_faces(tmp_path):
    """Contrast and matching from a folder: heads and eps from its config.json."""
    theirs, (ids, mask, _, _) = retrieval(), batch()
    theirs.save_pretrained(tmp_path)
    ours, pixels = load_qformer(tmp_path), torch.randn(3, 3, 28, 28)
    assert ours.config == QformerConfig(**SIZES | {"captions": False})
    image = theirs.vision_model(pixels).last_hidden_state
    given = dict(pixel_values=pixels, input_ids=ids, attention_mask=mask.long())
    x, y = ours.encode(ids, mask, image, "contrast")
    assert torch.allclose(ours.similarity(x, y), theirs(**given).logits_per_image, atol=1e-5)
    x, _ = ours.encode(ids, mask, image, "matching")
    wanted = theirs(**given, use_image_text_matching_head=True).logits_per_image
    assert torch.allclose(ours.itm_logits(x), wanted, atol=1e-5) and wanted.std() > 0.1
    assert ours.scale.item() == pytest.approx(1 / 0.07)


def test_a_q_former_of_a_captioner_has_queries_and_no_words():
    """As in Blip2ForConditionalGeneration: the picture encoder and the language model are passed over."""
    state = {f"qformer.{name}": z for name, z in face(use_qformer_text_input=False).state_dict().items()}
    state |= {"query_tokens": torch.randn(1, 7, 24), "language_projection.weight": torch.ones(3, 24)}
    state |= {"vision_model.a": torch.ones(1), "language_model.b": torch.ones(1)}
    ours = load_qformer(state, heads=3)
    image = batch()[2].float()
    assert ours.config.queries == 7 and not ours.config.words
    assert torch.equal(ours.read(image)[0], ours.run(state["query_tokens"].expand(3, -1, -1), 7, image))
    with pytest.raises(ValueError, match="model must have words"):
        ours.read_words(*batch()[:2])


def test_other_files_are_refused_by_name(tmp_path):
    state = face().state_dict()
    fewer = {name: z for name, z in state.items() if name != "encoder.layer.1.output.dense.bias"}
    without = {name: z for name, z in state.items() if "layer.0.crossattention" not in name}
    half = {
        name: z
        for name, z in state.items()
        if not name.startswith(("encoder.layer.1.output.", "encoder.layer.1.intermediate."))
    }
    for wrong, message in (
        ({"a": torch.ones(1)}, "must hold a Q-Former with its Hugging Face names, got a"),
        (fewer, r"every tensor of it, got missing qformer\.encoder\.layer\.1\.output\.dense\.bias"),
        (state | {"head.weight": torch.ones(1)}, r"nothing else, got unexpected qformer\.head\.weight"),
        (without, "must look at the picture in layer 0"),
        (half, "must look at the picture in every n-th layer, and have MLPs for words in all or none"),
        (state | {"layernorm.bias": torch.ones(3)}, r"qformer\.layernorm\.bias must have shape \(24,\), got"),
        (state, "heads must be given, as D=24 is not a multiple of 64"),
    ):
        with pytest.raises(ValueError, match=message):
            load_qformer(wrong, heads=None if wrong is state else 3)
    theirs = face()
    for key, value in (("num_hidden_layers", 5), ("cross_attention_frequency", 3), ("hidden_act", "relu")):
        theirs.save_pretrained(tmp_path)
        config = copy.deepcopy(theirs.config)
        setattr(config, key, value)
        config.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=f"config.json must have {key} = .*, as the weights do"):
            load_qformer(tmp_path)


def torchmultimodals(model):
    """torchmultimodal's Q-Former for captions with the weights of ours."""
    c = model.config
    theirs = torchmultimodal_qformer()(
        num_hidden_layers=c.layers, dim_q=c.dim, dim_feedforward=c.hidden, num_heads=c.heads,
        max_position_embeddings=c.max_text_len, vocab_size=c.vocab_size, query_length=c.queries,
        dim_kv=c.image_dim, cross_attention_freq=c.every,
    ).eval().requires_grad_(False)  # fmt: skip
    state = {}
    rows = [("norm.", "model.embeddings.layernorm."), ("mlm.dense.", "head.linear_1.")]
    rows += [("mlm.norm.", "head.layernorm.")]
    for i in range(c.layers):
        layer = [
            ("proj.", "self_attention.output_proj."), ("norm.", "self_attn_layernorm."),
            ("queries.fc1.", "feedforward_query.model.0."), ("queries.fc2.", "feedforward_query.model.2."),
            ("queries.norm.", "feedforward_layernorm_query."), ("words.fc1.", "feedforward.model.0."),
            ("words.fc2.", "feedforward.model.2."), ("words.norm.", "feedforward_layernorm."),
            ("qkv.", "self_attention.{q,k,v}_proj."),
        ]  # fmt: skip
        if i % c.every == 0:
            layer += [
                ("q.", "cross_attention.q_proj."), ("kv.", "cross_attention.{k,v}_proj."),
                ("proj_cross.", "cross_attention.output_proj."), ("norm_cross.", "cross_attn_layernorm."),
            ]  # fmt: skip
        rows += [(f"layers.{i}.{a}", f"model.encoder.layers.{i}.{b}") for a, b in layer]
    ours = model.state_dict()
    for a, b in names.both(rows):
        state |= zip(names.parts(b), ours[a].chunk(len(names.parts(b))), strict=True)
    state["model.embeddings.token_embeddings.weight"] = state["head.linear_2.weight"] = ours["word.weight"]
    state |= {"model.embeddings.position_embeddings.weight": ours["position.weight"]}
    state |= {"head.linear_2.bias": ours["mlm.bias"], "model.embeddings.position_ids": torch.arange(9)[None]}
    theirs.load_state_dict(state)
    return theirs.to(ours["query"].dtype)


def test_captions_are_torchmultimodals():
    """Their cached path: keys of the queries first, the words over them. The peer of our one pass."""
    model, (ids, mask, image, _) = made(), batch()
    theirs = torchmultimodals(model)
    queries = model.query.expand(3, -1, -1)
    states, kept = theirs.model(query_embeds=queries, encoder_hidden_states=image, use_cache=True)
    x, words = model.encode(ids, mask, image, "captions")
    assert torch.allclose(x, states, atol=1e-5)
    real = torch.cat([torch.ones(3, Q, dtype=torch.bool), mask], 1).double()
    wanted = theirs(ids, attention_mask=real, past_key_values=kept)
    assert torch.allclose(model.mlm_logits(words)[mask], wanted[mask], atol=1e-5) and wanted.std() > 1


def test_torchmultimodals_one_pass_has_the_known_mistake():
    """Its triangle lies over queries and words, tests/bugs/masks.py: a query does not see the later ones."""
    from tests.bugs.masks import queries_causal_in_one_pass  # which imports this file

    model, (ids, mask, image, _) = made(), batch()
    theirs = torchmultimodals(model)
    real, queries = torch.ones(3, Q + L, dtype=torch.float64), model.query.expand(3, -1, -1)
    found = theirs(ids, attention_mask=real, query_embeds=queries, encoder_hidden_states=image)
    full = torch.ones_like(mask)
    right = model.mlm_logits(model.encode(ids, full, image, "captions")[1])
    wrong = made(queries_causal_in_one_pass)
    assert (found - right).abs().max() > 0.01, "their one pass is right: the mistake is gone"
    assert torch.allclose(found, wrong.mlm_logits(wrong.encode(ids, full, image, "captions")[1]), atol=1e-5)
