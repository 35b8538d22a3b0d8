// Before the first paint, so that nobody who chose a theme sees the other one flash by.
const chosen = localStorage.getItem("studio.theme");
if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
