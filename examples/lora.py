"""LoRA on a Hugging Face transformer, two workers: what does not train is not sent.

    python examples/lora.py

The transformer is a small one with random weights, so that nothing is downloaded; a real one would come from
``AutoModelForSequenceClassification.from_pretrained(...)``. It reads handwritten digits as 64
tokens, one for each pixel. PEFT freezes it and adds low-rank matrices; strategy and algorithm see only what requires a
gradient.
"""

import logging
import os
import warnings

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import lightning as L
import torch
from peft import LoraConfig, TaskType, get_peft_model
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from lightning_slowmo import SlowMo, SlowMoStrategy

WORKERS, EPOCHS = 2, 6


def make_model():
    """A BERT of two layers, of which LoRA trains a sixth."""
    # Random weights as large as trained ones are: with smaller ones, little of the tokens would come through.
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    more = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.15}
    config = BertConfig(vocab_size=17, max_position_embeddings=64, num_labels=10, **sizes, **more)
    model = BertForSequenceClassification(config)
    return get_peft_model(model, LoraConfig(TaskType.SEQ_CLS, r=8, target_modules=["query", "value", "dense"]))


class Digits(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = make_model()

    def training_step(self, batch, _):
        tokens, labels = batch
        return self.model(input_ids=tokens, labels=labels).loss

    def validation_step(self, batch, _):
        tokens, labels = batch
        right = self.model(input_ids=tokens).logits.argmax(dim=1) == labels
        self.log("accuracy", right.float().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=5e-3)


def main():
    """Train, and say what was sent."""
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore", module=r"lightning\.|torch\.|transformers\.")
    L.seed_everything(1, workers=True, verbose=False)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images, dtype=torch.long), torch.tensor(labels))
    train, test = torch.utils.data.random_split(data, [1437, 360])
    trainer = L.Trainer(
        strategy=SlowMoStrategy(SlowMo(sync_every=12)),
        accelerator="cpu", devices=WORKERS, max_epochs=EPOCHS, num_sanity_val_steps=0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Digits()
    trainer.fit(module, DataLoader(train, 16, shuffle=True), DataLoader(test, 60))
    if trainer.is_global_zero:
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        everything = sum(p.numel() for p in module.parameters())
        sent = trainer.strategy.report.bytes_sent / 1e6
        ddp = trainer.global_step * 4 * everything * 2 * (WORKERS - 1) / WORKERS / 1e6
        print(f"accuracy {trainer.callback_metrics['accuracy']:.1%} after {trainer.global_step} steps")
        print(f"trained {trained:,} of {everything:,} parameters")
        print(f"sent {sent:.1f} MB; DDP on all parameters {ddp:.1f} MB")


if __name__ == "__main__":
    main()
