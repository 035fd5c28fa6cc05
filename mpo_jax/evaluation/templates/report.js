// Samples can be searched; without scripts they are all there.
for (const search of document.querySelectorAll(".search")) {
  const input = search.querySelector("input"), told = search.querySelector("[role=status]");
  const samples = [];
  for (let next = search.nextElementSibling; next?.matches(".sample"); next = next.nextElementSibling) samples.push(next);
  search.hidden = samples.length < 2;
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase();
    for (const sample of samples) {
      sample.hidden = !sample.textContent.toLowerCase().includes(wanted);
    }
    told.textContent = wanted ? `${samples.filter((sample) => !sample.hidden).length} of ${samples.length}` : "";
  });
}
