"""The accuracy study: one language model trained many ways on the same text, see docs/study.md."""
