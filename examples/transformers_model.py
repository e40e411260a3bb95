"""A transformers network: its encoder is pruned, embeddings, norms and the classifier are left alone."""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, Dataset
from transformers import BertConfig, BertForSequenceClassification

from lightning_compress import IterativePruningCallback

# Your own: BertForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=2)
CONFIG = BertConfig(
    vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=2
)


class WhichIsMore(Dataset):
    """Is there more of token 1 or of token 2? A stand-in for your text, tokenized."""

    def __init__(self, seed, size=1024):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(1, 4, (size, 15), generator=generator)
        self.labels = ((self.ids == 1).sum(1) > (self.ids == 2).sum(1)).long()

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "attention_mask": torch.ones(15).long(), "labels": self.labels[i]}


class TextClassifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = BertForSequenceClassification(CONFIG)

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def test_step(self, batch, batch_idx):
        self.log("test_acc", (self.model(**batch).logits.argmax(1) == batch["labels"]).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


if __name__ == "__main__":
    seed_everything(0)
    pruning = IterativePruningCallback(amount=0.8, target="model.bert.encoder.*", every_n_steps=16)
    trainer = Trainer(max_epochs=9, callbacks=[pruning], accelerator="cpu", logger=False, enable_checkpointing=False)
    module = TextClassifier()
    trainer.fit(module, DataLoader(WhichIsMore(0), batch_size=32, shuffle=True))
    (result,) = trainer.test(module, DataLoader(WhichIsMore(1), batch_size=256), verbose=False)
    for name, mask in pruning.masks.items():
        print(f"{name:55} {int(mask.sum()):5} of {mask.numel():5} left")
    print(f"test accuracy {result['test_acc']:.3f} with {pruning.sparsity:.0%} of the encoder's weights at zero")
