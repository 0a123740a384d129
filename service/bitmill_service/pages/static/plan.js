// Shows the plan of a new job while its form is filled in: the form's own page, asked for in the
// background when the typing pauses.
const PAUSE_MS = 400;

export function planAsTyped(form) {
  let waiting = null;
  let asked = null;

  async function plan() {
    const region = document.getElementById("plan");
    if (!form.checkValidity()) return;
    asked?.abort();
    asked = new AbortController();
    region.classList.add("stale");
    try {
      const answer = await fetch("/ui/jobs/new", {
        method: "POST",
        body: new URLSearchParams(new FormData(form)),
        signal: asked.signal,
      });
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const fresh = page.getElementById("plan");
      if (fresh) region.innerHTML = fresh.innerHTML;
      region.classList.remove("stale");
    } catch (error) {
      if (error.name !== "AbortError") region.classList.remove("stale");
    }
  }

  form.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(plan, PAUSE_MS);
  });
  if (!document.querySelector("#plan .notice, #plan meter")) plan();
}
