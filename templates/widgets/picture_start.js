// Everything answers: show the first picture.
frame.showTheme();
await frame.start(choice.select(0));
