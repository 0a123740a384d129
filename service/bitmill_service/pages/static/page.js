// What every page has: the theme button, copy buttons, and regions that follow the server.
import { follow } from "./live.js";
import { planAsTyped } from "./plan.js";

const root = document.documentElement;
const system = matchMedia("(prefers-color-scheme: dark)");

function themeButton(button) {
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => {
    button.textContent = dark() ? "Light" : "Dark";
    button.title = `Change to the ${dark() ? "light" : "dark"} theme`;
  };
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    localStorage.setItem("theme", root.dataset.theme);
    show();
  });
  system.addEventListener("change", show);
  button.hidden = false;
  show();
}

async function copy(button) {
  const text = button.previousElementSibling.textContent;
  await navigator.clipboard.writeText(text);
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

function showCopyButtons() {
  // The clipboard exists over https and on loopback only.
  for (const button of document.querySelectorAll("[data-copy]")) button.hidden = !navigator.clipboard;
}

themeButton(document.getElementById("theme"));
showCopyButtons();
document.addEventListener("click", (event) => {
  if (event.target.matches("[data-copy]")) copy(event.target);
});
follow(showCopyButtons);
const newJob = document.getElementById("new-job");
if (newJob) planAsTyped(newJob);
