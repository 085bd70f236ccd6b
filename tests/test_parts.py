"""The parts of relaxmim.py, each against what it claims: a loop, torchvision, or an identity."""

import math
import re
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as tv

from eval_occlusion import centre_mask, cka, cosine, occlude
from finetune import Classifier, accuracy, layer_groups
from finetune import Config as FinetuneConfig
from relaxmim import (
    MASKS,
    SIZES,
    Config,
    Decoder,
    Images,
    RelaxMIM,
    ViT,
    centred,
    decay_groups,
    fit,
    hide,
    info_nce,
    invariance,
    learning_rate,
    mae_loss,
    on_cpu,
    patchify,
    random_crops,
    random_mask,
    relax_loss,
    set_seed,
    sides,
    sincos_positions,
    split,
    synthetic_images,
    unpatchify,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small_vit(**kwargs):
    return ViT((16, 24), 4, 3, 32, 2, 2, **kwargs).eval()


# ------------------------------------------------------------------------ patches and masks


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_patchify_round_trip_and_layout(channels):
    images = torch.randn(2, channels, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 16 * channels)
    assert torch.equal(unpatchify(patches, (2, 3), 4), images)
    # the fifth patch is in row 1, column 1; within it rows, columns, channels
    expected = images[0, :, 4:8, 4:8].permute(1, 2, 0).flatten()
    assert torch.equal(patches[0, 4], expected)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("grid", [(8, 8), (3, 5), (1, 7)])
def test_every_row_hides_exactly_the_rounded_count(name, grid):
    N = math.prod(grid)
    for ratio in (0.0, 0.01, 0.25, 0.5, 0.6, 0.75, 0.9, 0.99, 1.0):
        mask = MASKS[name](64, grid, ratio)
        assert mask.dtype == torch.bool and mask.shape == (64, N)
        assert (mask.sum(1) == round(ratio * N)).all()


@pytest.mark.parametrize("name", MASKS)
def test_masks_differ_between_images_and_obey_their_generator(name):
    def make(seed):
        return MASKS[name](16, (8, 8), 0.5, torch.Generator().manual_seed(seed))

    assert torch.equal(make(1), make(1)) and not torch.equal(make(1), make(2))
    assert len(make(1).unique(dim=0)) > 1


def test_a_block_is_one_piece_and_a_grid_is_even():
    block = MASKS["block"](32, (8, 8), 0.25).view(32, 1, 8, 8).float()
    neighbours = F.conv2d(block, torch.ones(1, 1, 3, 3), padding=1) * block
    assert (neighbours[block > 0] >= 3).all()  # itself and two more: no patch stands alone
    visible = ~MASKS["grid"](32, (8, 8), 0.75).view(32, 4, 2, 4, 2)
    assert (visible.sum((2, 4)) == 1).all()  # one of each 2 x 2 patches


def test_split_orders_the_indices_and_refuses_unequal_rows():
    mask = random_mask(5, (4, 4), 0.5)
    visible, hidden = split(mask)
    for row, v, h in zip(mask, visible, hidden):
        assert v.tolist() == [i for i in range(16) if not row[i]]
        assert h.tolist() == [i for i in range(16) if row[i]]
    mask[0] = True
    with pytest.raises(ValueError, match="same number"):
        split(mask)


# ------------------------------------------------------------------------------------ model


def test_hidden_pixels_cannot_reach_the_encoder():
    encoder, images, mask = small_vit(), torch.randn(3, 3, 16, 24), random_mask(3, (4, 6), 0.5)
    patches = patchify(images, 4)
    others = torch.where(mask[..., None], torch.randn_like(patches) * 100, patches)
    with torch.no_grad():
        before, after = encoder(images, mask), encoder(unpatchify(others, (4, 6), 4), mask)
        shown = torch.where(mask[..., None], patches, torch.randn_like(patches))
        changed = encoder(unpatchify(shown, (4, 6), 4), mask)
    assert before.shape == (3, 1 + 12, 32)
    assert torch.equal(before, after)
    assert not torch.allclose(before, changed)


def test_visible_patches_keep_their_positions():
    encoder, images, mask = small_vit(), torch.randn(3, 3, 16, 24), random_mask(3, (4, 6), 0.5)
    x = encoder.patch_embed.proj(images).flatten(2).transpose(1, 2) + encoder.pos_embed[:, 1:]
    x = torch.stack([tokens[~row] for tokens, row in zip(x, mask)])
    x = torch.cat([encoder.cls_token.expand(3, -1, -1), x], 1)
    for block in encoder.blocks:
        x = block(x)
    torch.testing.assert_close(encoder(images, mask), encoder.norm(x))


def test_nothing_hidden_is_the_same_as_no_mask():
    encoder, images = small_vit(), torch.randn(2, 3, 16, 24)
    nothing = torch.zeros(2, 24, dtype=torch.bool)
    torch.testing.assert_close(encoder(images, nothing), encoder(images))


def test_patch_embedding_is_the_convolution_whose_weights_it_has():
    encoder, images = small_vit(), torch.randn(2, 3, 16, 24)
    seen = []
    encoder.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    encoder(images)
    expected = encoder.patch_embed.proj(images).flatten(2).transpose(1, 2)
    expected = expected + encoder.pos_embed[:, 1:]
    torch.testing.assert_close(seen[0][:, 1:], expected)
    torch.testing.assert_close(seen[0][:, 0], (encoder.cls_token[0]).expand(2, -1))


def test_attention_is_scaled_dot_product_attention():
    attention, x = small_vit().blocks[0].attn, torch.randn(2, 5, 32)
    q, k, v = attention.qkv(x).view(2, 5, 3, 2, 16).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 32)
    torch.testing.assert_close(attention(x), attention.proj(expected))


def test_positions_are_mae_s_layout():
    table = sincos_positions((2, 3), 8)[0]
    assert table.shape == (7, 8) and (table[0] == 0).all()
    for row in range(2):
        for col in range(3):
            angles = [col, col * 0.01], [row, row * 0.01]
            expected = [f(a) for side in angles for f in (math.sin, math.cos) for a in side]
            torch.testing.assert_close(table[1 + row * 3 + col], torch.tensor(expected))


def test_names_and_shapes_are_timm_s():
    depth, dim = 2, 32
    expected = {"cls_token": (1, 1, dim), "pos_embed": (1, 25, dim)}
    expected |= {"patch_embed.proj.weight": (dim, 3, 4, 4), "patch_embed.proj.bias": (dim,)}
    shapes = {"qkv": (96, 32), "proj": (32, 32), "fc1": (128, 32), "fc2": (32, 128)}
    for i in range(depth):
        for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            shape = shapes[name.split(".")[1]]
            expected[f"blocks.{i}.{name}.weight"] = shape
            expected[f"blocks.{i}.{name}.bias"] = shape[:1]
        for name in ("norm1", "norm2"):
            expected |= {f"blocks.{i}.{name}.{part}": (dim,) for part in ("weight", "bias")}
    expected |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    assert {k: tuple(v.shape) for k, v in small_vit().state_dict().items()} == expected


def test_weights_go_both_ways_to_timm():
    timm = pytest.importorskip("timm")
    options = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 3, "num_heads": 4}
    theirs = timm.models.vision_transformer.VisionTransformer(**options, num_classes=0).eval()
    ours, images = ViT(32, 4, 3, 64, 3, 4).eval(), torch.randn(2, 3, 32, 32)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(theirs.forward_features(images), ours(images), atol=1e-5, rtol=1e-5)
    options |= {"num_classes": 7, "global_pool": "avg"}
    theirs = timm.models.vision_transformer.VisionTransformer(**options).eval()
    ours = Classifier(32, 4, 3, 64, 3, 4, num_classes=7).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(theirs(images), ours(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_with_mae_s_weights_the_loss_is_that_of_transformers(norm_pix):
    """Encoder, decoder and loss against ViTMAE, given the same weights, images and mask."""
    transformers = pytest.importorskip("transformers")
    options = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    options |= {"intermediate_size": 256, "image_size": 48, "patch_size": 8, "mask_ratio": 0.75}
    options |= {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "layer_norm_eps": 1e-6}
    options |= {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 128}
    settings = transformers.ViTMAEConfig(**options, norm_pix_loss=norm_pix)
    theirs = transformers.ViTMAEForPreTraining(settings).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:  # biases too, which start at 0
            parameter.data += 0.05 * torch.randn_like(parameter)

    renamed = {
        r"^vit\.(embeddings\.)?|^decoder\.": "",
        r"\blayers\b": "blocks",
        r"\bdecoder_layers\b": "decoder_blocks",
        "position_embeddings": "pos_embed",
        "patch_embeddings.projection": "patch_embed.proj",
        "attention.o_proj": "attn.proj",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "layernorm": "norm",
    }
    weights = {}
    for name, value in theirs.state_dict().items():
        for pattern, ours in renamed.items():
            name = re.sub(pattern, ours, name)
        weights[name] = value
    for name in [name for name in weights if ".q_proj." in name]:  # one matrix in MAE's layout
        parts = [weights.pop(name.replace(".q_", f".{letter}_")) for letter in "qkv"]
        weights[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    model = RelaxMIM(Config("mae", mask_ratio=0.75, norm_pix=norm_pix, patch_size=8, img_size="48"))
    model.encoder, model.decoder = ViT(48, 8, 3, 64, 3, 4), Decoder((6, 6), 64, 32, 2, 2, 192)
    decoder = {
        name: value for name, value in weights.items() if re.match("decoder|mask_token", name)
    }
    model.decoder.load_state_dict(decoder, strict=True)
    model.encoder.load_state_dict(
        {k: v for k, v in weights.items() if k not in decoder}, strict=True
    )

    images, noise = torch.randn(4, 3, 48, 48), torch.rand(4, 36)
    mask = hide(-noise, 0.75)  # theirs keeps what has the least noise
    with torch.no_grad():
        expected = theirs(images, noise=noise)
        model.hidden2 = 9  # let view 2 show all that view 1 hides
        loss, _ = model(images, images, mask, ~mask)
    assert torch.equal(expected.mask.bool(), mask)
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-5)


def test_the_classifier_s_encoder_is_the_encoder():
    encoder = small_vit()
    model = Classifier((16, 24), 4, 3, 32, 2, 2, num_classes=5).eval()
    weights = {k: v for k, v in encoder.state_dict().items() if not k.startswith("norm.")}
    missing, extra = model.load_state_dict(weights, strict=False)
    assert extra == [] and all(k.startswith(("head", "fc_norm")) for k in missing)
    images, mask = torch.randn(2, 3, 16, 24), random_mask(2, (4, 6), 0.5)
    encoder.norm = torch.nn.Identity()
    for m in (None, mask):
        pooled = encoder(images, m)[:, 1:].mean(1)
        torch.testing.assert_close(model(images, m), model.head(model.fc_norm(pooled)))


def test_the_decoder_answers_for_hidden_positions_in_order():
    decoder = Decoder((4, 4), 32, 32, 2, 2, 6).eval()
    tokens, mask = torch.randn(2, 1 + 4, 32), random_mask(2, (4, 4), 0.75)
    visible, hidden = split(mask)
    hidden = hidden.flip(1)  # in any order
    # MAE's way: every token at its place, the class token first
    x = decoder.decoder_embed(tokens)
    full = decoder.mask_token.expand(2, 16, -1).clone()
    for b in range(2):
        full[b, visible[b]] = x[b, 1:]
    x = torch.cat([x[:, :1], full], 1) + decoder.decoder_pos_embed
    for block in decoder.decoder_blocks:
        x = block(x)
    x = decoder.decoder_pred(decoder.decoder_norm(x))[:, 1:]
    expected = torch.stack([x[b, hidden[b]] for b in range(2)])
    torch.testing.assert_close(decoder(tokens, visible, hidden), expected)


# ----------------------------------------------------------------------------- similarities


def test_mae_loss_against_a_loop_and_only_hidden_patches_get_a_gradient():
    pred, x, mask = torch.randn(3, 16, 12), torch.randn(3, 16, 12), random_mask(3, (4, 4), 0.6)
    pred.requires_grad_()
    errors = [
        sum((pred[b, n, p].item() - x[b, n, p].item()) ** 2 for p in range(12)) / 12
        for b in range(3)
        for n in range(16)
        if mask[b, n]
    ]
    loss = mae_loss(pred, x, mask)
    assert loss.item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    loss.backward()
    assert (pred.grad[~mask] == 0).all() and (pred.grad[mask] != 0).all()
    hidden = pred[mask].view(3, -1, 12), x[mask].view(3, -1, 12)
    torch.testing.assert_close(mae_loss(*hidden), loss)


def test_relax_loss_against_a_loop_and_equal_to_mae_with_a_perfect_second_decoder():
    d1, d2, x = torch.randn(3, 2, 5, 4).unbind(0)
    expected = 0.0
    for b in range(2):
        for n in range(5):
            for p in range(4):
                a, c, y = (t[b, n, p].item() for t in (d1, d2, x))
                expected += ((a - c) ** 2 + 0.7 * (c - y) ** 2) / 40
    assert relax_loss(d1, d2, x, 0.7).item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(relax_loss(d1, x, x, 3.0), mae_loss(d1, x))
    d2.requires_grad_()  # has its gradient from the constraint alone
    relax_loss(d1, d2, x, 0.7).backward()
    torch.testing.assert_close(d2.grad, 0.7 * (d2.detach() - x) * 2 / d2.numel())


def test_info_nce_against_a_loop():
    q, k = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    losses, right = [], []
    for g in range(2):
        for i in range(6):
            cosines = [F.cosine_similarity(q[g, i], k[g, j], dim=0).item() for j in range(6)]
            total = sum(math.exp(c / 0.3) for c in cosines)
            losses.append(-math.log(math.exp(cosines[i] / 0.3) / total))
            right.append(max(cosines) == cosines[i])
    loss, accuracy = info_nce(q, k, 0.3)
    assert loss.item() == pytest.approx(sum(losses) / 12, rel=1e-5)
    assert accuracy.item() == pytest.approx(sum(right) / 12)


@pytest.mark.parametrize("n", [2, 7, 128])
def test_features_that_do_not_depend_on_the_image_give_log_n(n):
    constant = torch.randn(1, 8).expand(n, 8)
    assert info_nce(constant, constant, 0.1)[0].item() == pytest.approx(math.log(n), rel=1e-5)


# --------------------------------------------------------------------------------- RelaxMIM


def views_and_masks(B=16):
    """Twice the same images, and the masks of the default configuration."""
    images, mask1 = torch.randn(B, 3, 32, 32), random_mask(B, (8, 8), 0.75)
    return images, images, mask1, hide(torch.rand(B, 64) + mask1, 40 / 64)


@pytest.mark.parametrize("loss", ["mae", "relax", "infonce"])
def test_every_weight_gets_a_gradient(loss):
    model = RelaxMIM(Config(loss=loss))
    model(*views_and_masks())[0].backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused == []


@pytest.mark.parametrize("loss, expected", [("relax", True), ("infonce", False)])
def test_only_relax_has_a_gradient_through_its_second_view(loss, expected):
    view1, _, mask1, mask2 = views_and_masks()
    view2 = view1.clone().requires_grad_()
    RelaxMIM(Config(loss=loss))(view1, view2, mask1, mask2)[0].backward()
    assert (view2.grad is not None and bool(view2.grad.any())) == expected
    if expected:  # view 2 shows half of what view 1 hides, and nothing else
        seen = patchify(view2.grad, 4).any(-1)
        assert torch.equal(seen, ~mask2) and not (seen & ~mask1).any()
        assert (seen.sum(1) == 24).all()


def test_infonce_starts_near_log_of_the_candidates():
    loss, figures = RelaxMIM(Config(loss="infonce"))(*views_and_masks(64))  # of 24 targets
    assert math.log(24) - 0.1 < loss.item() < math.log(24) + 0.4 and figures["accuracy"] < 0.2


def test_infonce_compares_what_an_image_has_at_a_place_beyond_what_its_batch_has_there():
    model = RelaxMIM(Config(loss="infonce"))
    view1, view2, mask1, mask2 = views_and_masks()
    visible, targets = split(mask1)[0], split(mask2)[0]
    with torch.no_grad():
        q = model.decoder(model.encoder(view1, mask1), visible, targets)
        k = model.encoder(view2, mask2)[:, 1:]
        plain = info_nce(q, k, 0.2)[0].item()
        for place in range(64):
            at = targets == place
            for tokens in (q, k):
                tokens[at] -= tokens[at].mean(0) if at.any() else 0.0
        loss = info_nce(q, k, 0.2)[0].item()
    assert model(view1, view2, mask1, mask2)[0].item() == pytest.approx(loss, rel=1e-5)
    assert loss != pytest.approx(plain, rel=1e-3)


def test_a_place_that_one_image_shows_leaves_the_gradient_finite():
    targets = split(views_and_masks(3)[3])[0]
    alone = targets.flatten().bincount(minlength=64)[targets] == 1  # there q and k become 0
    q, k = torch.randn(3, 24, 8, requires_grad=True), torch.randn(3, 24, 8)
    info_nce(centred(q, targets, 64), centred(k, targets, 64), 0.2)[0].backward()
    assert alone.any() and not alone.all() and q.grad.any()
    assert q.grad.abs().max() < 1 and q.grad[alone].abs().max() < 1e-3


def test_norm_pix_changes_the_target_to_mean_0_and_variance_1():
    # a decoder that says 0 has a loss of the target's second moment: (P - 1) / P for unit variance
    model = RelaxMIM(Config(loss="mae"))
    for parameter in model.decoder.decoder_pred.parameters():
        parameter.data.zero_()
    loss, _ = model(*views_and_masks())
    assert loss.item() == pytest.approx(47 / 48, rel=1e-3)
    model.config.norm_pix = False
    images, _, _, mask2 = views = views_and_masks()
    targets = patchify(images, 4)[~mask2]
    torch.testing.assert_close(model(*views)[0], targets.square().mean())


def test_invariance_against_a_loop():
    encoder = small_vit()
    images, mask = torch.randn(5, 3, 16, 24), random_mask(5, (4, 6), 0.5)
    with torch.no_grad():
        a, b = encoder(images)[:, 1:].mean(1), encoder(images, mask)[:, 1:].mean(1)
    centre = torch.cat([a, b]).mean(0)
    cosines = [[F.cosine_similarity(x - centre, y - centre, dim=0) for y in b] for x in a]
    same = sum(cosines[i][i].item() for i in range(5)) / 5
    different = sum(cosines[i][j].item() for i in range(5) for j in range(5) if i != j) / 20
    found = invariance(encoder, images, mask)
    assert (found["invariance"], found["different"]) == pytest.approx((same, different), abs=1e-5)
    found = invariance(encoder, images, torch.zeros_like(mask))
    assert found["invariance"] == pytest.approx(1, abs=1e-5)


# ------------------------------------------------------------------------------------- data


def smooth_images(n, H, W):
    noise = F.pad(torch.rand(n, 3, H, W) * 255, (3, 3, 3, 3), mode="reflect")
    return F.avg_pool2d(noise, 7, stride=1).round().byte()


def boxed(box, H, W):
    """The numbers u of random_crops that cut a box (left, top, width, height) of one photograph."""
    left, top, width, height = box
    area, ratio = width * height / (H * W), width / height
    smallest = min(0.2, 64 / (H * W))
    u = [math.log(area) / math.log(smallest), math.log(ratio) / 2 / math.log(4 / 3) + 0.5]
    u += [left / max(W - width, 1e-9), top / max(H - height, 1e-9), 0.9]
    return torch.tensor(u)[:, None]


@pytest.mark.parametrize("box", [(5, 3, 20, 20), (0, 0, 45, 40), (7, 10, 11, 9), (20, 20, 8, 8)])
@pytest.mark.parametrize("size", [8, (12, 12), "16x16"])
def test_the_batched_crop_is_torchvision_s_one_by_one(box, size):
    image, (left, top, width, height) = smooth_images(1, 40, 50), box
    h, w = sides(size)
    u = boxed(box, 40, 50)
    u[0] = math.log(width * height / 2000) / math.log(min(0.2, h * w / 2000))
    ours = random_crops(image, u, size)[0]
    expected = tv.crop(image[0].float(), top, left, height, width)
    expected = tv.resize(expected, [h, w], antialias=True)
    # the two differ in how they average, and at the edge, where tv sees no neighbours
    assert (ours - expected).abs().mean() < 1.5
    assert (ours - expected).abs().max() < 12
    shifted = tv.crop(image[0].float(), top, left + 2, height, width - 2)
    assert (ours - tv.resize(shifted, [h, w], antialias=True)).abs().mean() > 1
    flipped = random_crops(image, torch.cat([u[:4], u[4:] - 0.5]), size)[0]
    assert torch.equal(flipped, ours.flip(2))
    batch = image.expand(3, -1, -1, -1).clone()  # of several images the area is uniform
    u[0] = (width * height / 2000 - min(0.2, h * w / 2000)) / (1 - min(0.2, h * w / 2000))
    for crop in random_crops(batch, u.expand(-1, 3), size):
        torch.testing.assert_close(crop, ours, atol=0.1, rtol=0)


def test_crops_of_another_shape_are_not_squeezed():
    ramp = torch.arange(60, dtype=torch.uint8)
    images = torch.stack([ramp.expand(60, 60), ramp.expand(60, 60).T, ramp.expand(60, 60)])[None]
    crops = random_crops(images, torch.rand(5, 400), (16, 32))
    across = (crops[:, 0, :, -1] - crops[:, 0, :, 0]).abs().mean(1) * 32 / 31
    down = (crops[:, 1, -1] - crops[:, 1, 0]).abs().mean(1) * 16 / 15
    ratio = (across / down)[across < 59]  # of the crops that the image's width did not narrow
    assert crops.shape == (400, 3, 16, 32) and len(ratio) > 100
    assert 1.49 < ratio.min() < 1.7 and 2.3 < ratio.max() < 2.68


def test_images_are_normalised_as_torchvision_does():
    images = torch.randint(256, (2, 3, 8, 8)).byte()
    expected = tv.normalize(images / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    ours = Images(["a", "b"], images).normalise(images)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lone, middle", [(True, 0.2**0.5), (False, 0.6)])
def test_random_crops_stay_inside_and_vary(lone, middle):
    ramp = torch.arange(60, dtype=torch.uint8).view(1, 1, 1, 60).expand(1, 3, 60, 60)
    ramp = ramp if lone else ramp.expand(400, -1, -1, -1)
    crops = random_crops(ramp, torch.rand(5, 400), 30)
    assert crops.min() >= -1e-3 and crops.max() <= 59.001
    spans = (crops[:, 0, 0, -1] - crops[:, 0, 0, 0]) * 30 / 29  # signed by the flip
    share = (spans.abs() / 60) ** 2  # of the area, up to the aspect ratio
    assert 0.4 < (spans > 0).float().mean() < 0.6
    assert 0.1 < share.min() < 0.3 and 0.9 < share.max() <= 1.02
    assert share.median() == pytest.approx(middle, abs=0.06)


def test_synthetic_images_depend_on_their_index_and_seed_alone():
    images = synthetic_images([5, 9, 700], 32)
    assert torch.equal(images[[2, 0]], synthetic_images([700, 5], 32))
    assert not torch.equal(images, synthetic_images([5, 9, 700], 32, seed=1))


def indices_of_a_run(n, batch, steps, seed, out):
    """The images that each step of the training loop takes."""
    taken, model = [], torch.nn.Linear(1, 1)

    def forward(index, pixels):
        taken.append(index)
        return model(torch.ones(1)).sum(), {}

    config = Config(batch_size=batch, steps=steps, seed=seed, out=str(out))
    optimizer = torch.optim.AdamW(decay_groups(list(model.parameters()), 0.0), fused=True)
    data = Images([str(i) for i in range(n)], torch.zeros(n, 3, 4, 4, dtype=torch.uint8))
    fit(config, {"encoder": model}, optimizer, None, data, "cpu", forward, dict)
    return torch.cat(taken)


@pytest.mark.parametrize("n, batch", [(10, 4), (3, 8), (1, 5)])
def test_an_epoch_takes_every_image_once_in_an_order_of_the_seed(n, batch, tmp_path):
    taken = indices_of_a_run(n, batch, n, 0, tmp_path)
    assert taken.shape == (n * batch,)
    for epoch in taken.view(batch, n):
        assert torch.equal(epoch.sort().values, torch.arange(n))
    assert torch.equal(indices_of_a_run(n, batch, n, 0, tmp_path), taken)
    assert n < 10 or not torch.equal(indices_of_a_run(n, batch, n, 1, tmp_path), taken)
    assert n < 10 or not torch.equal(taken[:n], taken[n : 2 * n])


# --------------------------------------------------------------------------------- training


def test_learning_rate_rises_then_falls_to_0():
    config = Config(steps=100, lr=2.0)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0) and rates[100] == pytest.approx(0.0)
    assert all(a > b for a, b in pairwise(rates[10:]))


def test_the_seed_of_a_step_does_not_depend_on_what_came_before():
    set_seed(0, 3)
    expected = torch.rand(4)
    set_seed(0, 2)
    torch.rand(100)
    set_seed(0, 3)
    assert torch.equal(torch.rand(4), expected)
    set_seed(1, 3)
    assert not torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("loss", ["mae", "relax", "infonce", "crop"])
def test_a_training_step_makes_no_tensor_on_the_wrong_device(loss):
    """The forward pass of a step on "cuda", in fake tensors: needs no GPU, names any mismatch."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = Config(loss="infonce", transform="crop") if loss == "crop" else Config(loss=loss)
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            with torch.device("cuda"):
                model = RelaxMIM(config)
        except RuntimeError as error:
            if "driver version" not in str(error):
                raise
            pytest.skip("this version of torch wants a driver even for fake tensors on CUDA")
        pixels = torch.zeros(4, 3, 40, 40, dtype=torch.uint8, device="cuda")
        images = random_crops(pixels, torch.rand(5, 4, device="cuda"), 32)
        for make in MASKS.values():
            mask = make(4, (8, 8), 0.75, device="cuda")
            mask2 = hide(torch.rand(4, 64, device="cuda") + mask, 40 / 64)
            with torch.autocast("cuda", torch.bfloat16):
                value, figures = model(images, images, mask, mask2)
            tensors = [images, mask, mask2, value, *figures.values()]
            devices = {str(t.device) for t in tensors if isinstance(t, torch.Tensor)}
            assert devices == {"cuda:0"}


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"a": [1, x]}, lambda x: [{0: {"b": x}}]])
def test_every_tensor_of_a_checkpoint_is_brought_to_the_cpu(wrap, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: x + 1)  # a mark of having been brought
    assert on_cpu(wrap(torch.tensor(1.0))) == wrap(torch.tensor(2.0))
    monkeypatch.undo()
    x = torch.ones(2)
    assert on_cpu({"x": [x], "betas": (0.9, 0.95), "step": 3}) == {
        "x": [x],
        "betas": (0.9, 0.95),
        "step": 3,
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("loss", ["mae", "relax", "infonce", "crop"])
def test_a_gpu_gives_the_loss_and_the_gradients_that_the_cpu_gives(loss):
    torch.manual_seed(0)
    config = Config(loss="infonce", transform="crop") if loss == "crop" else Config(loss=loss)
    model, images = RelaxMIM(config), torch.randn(2, 8, 3, 32, 32)
    mask = random_mask(8, (8, 8), 0.75)
    mask2 = hide(torch.rand(8, 64) + mask, model.hidden2 / 64)
    found = []
    for device in ("cpu", "cuda"):
        model.zero_grad()
        value, _ = model.to(device)(*(x.to(device) for x in (*images, mask, mask2)))
        value.backward()
        found.append([value.detach().cpu(), *(p.grad.cpu() for p in model.parameters())])
    for ours, theirs in zip(*found):
        assert (ours - theirs).norm() < 1e-3 * ours.norm() + 1e-6


def test_sizes_are_the_field_s():
    assert SIZES["tiny"] == (192, 12, 3) and SIZES["base"] == (768, 12, 12)
    with pytest.raises(ValueError, match="do not divide"):
        ViT(30, 4, 3, 32, 1, 2)


def test_the_learning_rate_falls_from_the_head_down():
    model = Classifier(16, 4, 3, 32, 2, 2, num_classes=5)
    rates = {}
    for group in layer_groups(model, FinetuneConfig(layer_decay=0.5)):
        for parameter in group["params"]:
            rates[id(parameter)] = (group["scale"], group["weight_decay"])
    for name, parameter in model.named_parameters():
        layer = 0 if name.startswith(("cls_token", "patch_embed")) else 3
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks") else layer
        decay = 0.05 if parameter.ndim > 1 else 0.0
        assert rates[id(parameter)] == (0.5 ** (3 - layer), decay)


def test_cka_against_centred_gram_matrices_and_cosine_by_hand():
    a, b = torch.randn(20, 6), torch.randn(20, 9)
    b[:, :6] += a
    grams = [(x - x.mean(0)) @ (x - x.mean(0)).T for x in (a, b)]
    expected = (grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm())
    assert 0.1 < expected < 0.9 and cka(a, b) == pytest.approx(expected.item(), abs=1e-5)
    turned = 3 * a @ torch.linalg.qr(torch.randn(6, 6))[0] + 5
    assert cka(a, turned) == pytest.approx(1.0, abs=1e-5)
    assert cosine(a, a) == pytest.approx(1.0, abs=1e-5)
    one, other = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    assert cosine(one, other) == pytest.approx(0.0, abs=1e-6)
    assert cosine(one + 7, other + 7) == pytest.approx(0.0, abs=1e-6)  # centred


def test_accuracy_counts_the_images_whose_label_is_named():
    class ByColour(torch.nn.Module):
        def forward(self, images):
            return images.mean((2, 3))

    pixels = torch.zeros(300, 3, 4, 4, dtype=torch.uint8)
    pixels[torch.arange(300), torch.arange(300) % 3] = 200
    labels = torch.arange(300) % 3
    labels[:30] = (labels[:30] + 1) % 3
    data = Images([f"x/{i}" for i in range(300)], pixels)
    assert accuracy(ByColour(), data, labels, "cpu", 4) == pytest.approx(0.9)


def test_the_centre_is_hidden_first():
    mask = centre_mask(3, (4, 4), 0.25).unflatten(1, (4, 4))
    assert mask[:, 1:3, 1:3].all() and mask.sum() == 12


def test_noise_and_grey_behind_the_mask_only():
    images, mask = torch.randn(2, 3, 8, 8) + 9, torch.tensor([[True, False, False, True]] * 2)
    for fill, std in (("noise", 1.0), ("mean", 0.0)):
        patches = patchify(occlude(images, mask, 4, fill), 4)
        assert patches[mask].std().item() == pytest.approx(std, abs=0.2)
        assert abs(patches[mask].mean()) < 0.3
        assert torch.equal(patches[~mask], patchify(images, 4)[~mask])


def test_drop_path_rises_with_depth_and_acts_in_training_alone():
    model = Classifier(8, 4, 3, 32, 3, 2, num_classes=5, drop_path=0.8)
    assert [block.drop_path for block in model.blocks] == pytest.approx([0.0, 0.4, 0.8])
    images = torch.randn(16, 3, 8, 8)
    still = model.eval()(images)
    assert torch.equal(still, model(images)) and not torch.allclose(still, model.train()(images))


def test_the_temperature_asked_for_is_the_one_used():
    losses = []
    for temperature in (0.1, 1.0):
        torch.manual_seed(0)
        model = RelaxMIM(Config(img_size=16, temperature=temperature, decoder_depth=1))
        mask = random_mask(4, (4, 4), 0.75)
        other = hide(torch.rand(4, 16) + mask, model.hidden2 / 16)
        losses.append(model(*[torch.randn(4, 3, 16, 16)] * 2, mask, other)[0].item())
    assert abs(losses[0] - losses[1]) > 0.01


def test_the_gradient_of_centred_tokens_is_the_same_bits_each_time():
    tokens, targets = torch.randn(128, 24, 128), torch.rand(128, 64).argsort(1)[:, :24]
    weights, grads = torch.randn_like(tokens), []
    for _ in range(5):
        x = tokens.clone().requires_grad_()
        (centred(x, targets, 64) * weights).sum().backward()
        grads.append(x.grad)
    assert all(torch.equal(grads[0], grad) for grad in grads)
