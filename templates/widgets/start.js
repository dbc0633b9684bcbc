// Everything is in place: show the layer that the address names, or the worst.
frame.showTheme();
await frame.start(detail.start());
