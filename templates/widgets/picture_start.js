// Everything answers: show the first picture.
frame.showTheme();
choice.select(0);
await frame.start(gallery.drawn);
