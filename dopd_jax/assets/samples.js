'use strict';
// Everything that comes from a record is written with textContent: it can never become markup.

const { regimes, records } = JSON.parse(document.getElementById('data').textContent);
const card = document.getElementById('card');
const articles = [...document.querySelectorAll('article')];
const completions = articles.map(article => article.querySelector('.completion'));
const regimeOf = span => Number(span.className.match(/\br(\d+)/)[1]);

// --- Numbers. null: not known; 'nan', 'inf' and '-inf': known, and not finite.

const number = v => typeof v === 'string' ? Number(v.replace('inf', 'Infinity')) : v;
const finite = v => typeof v === 'number' && Number.isFinite(v);

function format(v) {
  if (Number.isNaN(v)) return 'not a number';
  if (!Number.isFinite(v)) return v > 0 ? '∞' : '−∞';
  const size = Math.abs(v);
  const text = v !== 0 && (size < 1e-3 || size >= 1e4) ? v.toExponential(1) : v.toFixed(3);
  return text.replace('-', '−');
}

// --- The card of a token.

function element(tag, className, text) {
  const e = document.createElement(tag);
  if (className) e.className = className;
  if (text !== undefined) e.textContent = text;
  return e;
}

function addRow(table, name, value, note) {
  const row = table.insertRow();
  row.append(element('th', '', name), element('td', '', value));
  const cell = element('td', 'note');
  cell.append(note ?? '');
  row.append(cell);
}

function level(probability) {
  const box = element('div', 'level');
  const fill = element('i');
  fill.style.width = `${100 * Math.min(Math.max(probability || 0, 0), 1)}%`;
  box.append(fill);
  return box;
}

const compared = (v, threshold) =>
  threshold === null || Number.isNaN(v) ? '' : `${v < threshold ? '<' : '≥'} ${format(threshold)}`;

let current = null;
let pinned = false;

function show(span) {
  hide();
  current = span;
  span.classList.add('current');
  const r = completions.indexOf(span.parentElement);
  const n = [...span.parentElement.children].indexOf(span);
  const record = records[r];
  const at = field => record[field] === null ? null : number(record[field][n]);
  const regime = regimes[regimeOf(span)];

  const top = element('div', `top r${regimeOf(span)}`);
  top.append(element('span', 'swatch'), element('b', '', regime.name), element('span', '', regime.label),
             element('code', '', JSON.stringify(span.textContent)));
  const table = element('table');
  const qT = at('privileged_teacher_logp'), qS = at('privileged_student_logp'), s = at('student_logp');
  const gap = at('gap'), loss = at('loss');
  for (const [name, logp] of [['privileged teacher q_T', qT], ['privileged student q_S', qS], ['plain student S', s]]) {
    if (logp !== null) addRow(table, name, format(Math.exp(logp)), level(Math.exp(logp)));
  }
  if (qT !== null && qS !== null) {
    const sum = Math.exp(qT) + Math.exp(qS);
    addRow(table, 'confidence q_S + q_T', format(sum), compared(sum, number(record.confidence_threshold)));
  }
  if (gap !== null) addRow(table, 'gap (nats)', format(gap), compared(gap, number(record.gap_threshold)));
  if (loss !== null) addRow(table, 'loss (nats)', format(loss));
  card.replaceChildren(top, element('p', 'rule', regime.condition), table,
                       element('p', 'foot', `token ${n + 1} of ${span.parentElement.children.length}`));
  card.hidden = false;
  place(span);
}

function place(span) {
  const at = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const box = card.getBoundingClientRect();
  const below = at.bottom + 8 + box.height < innerHeight || at.top < box.height + 16;
  card.style.left = `${Math.max(8, Math.min(at.left, innerWidth - box.width - 8))}px`;
  card.style.top = `${below ? at.bottom + 8 : at.top - box.height - 8}px`;
}

function hide() {
  current?.classList.remove('current');
  current = null;
  card.hidden = true;
}

function pin(span) {
  pinned = true;
  show(span);
  card.classList.add('pinned');
  const r = completions.indexOf(span.parentElement);
  history.replaceState(null, '', `#${r}.${[...span.parentElement.children].indexOf(span)}`);
}

function unpin() {
  pinned = false;
  card.classList.remove('pinned');
  hide();
}

const tokenAt = target => target.closest?.('.completion > span');

document.addEventListener('mouseover', event => {
  if (pinned) return;
  const span = tokenAt(event.target);
  if (span) show(span); else hide();
});
document.addEventListener('click', event => {
  const span = tokenAt(event.target);
  if (!span) { if (!card.contains(event.target)) unpin(); return; }
  if (pinned && span === current) unpin(); else { focusToken(span); pin(span); }
});
addEventListener('scroll', () => { if (current) place(current); }, { passive: true });

// --- Keyboard: one tab stop a completion, arrows inside it.

function focusToken(span) {
  span.parentElement.querySelector('[tabindex="0"]')?.setAttribute('tabindex', '-1');
  span.setAttribute('tabindex', '0');
  span.focus({ preventScroll: true });
}

for (const completion of completions) completion?.firstElementChild.setAttribute('tabindex', '0');
document.addEventListener('focusin', event => {
  const span = tokenAt(event.target);
  if (span) show(span); else if (!pinned) hide();
});
document.addEventListener('keydown', event => {
  if (event.key === 'Escape') return unpin();
  const span = tokenAt(event.target);
  if (!span) return;
  const tokens = [...span.parentElement.children];
  const n = tokens.indexOf(span);
  const next = { ArrowRight: n + 1, ArrowLeft: n - 1, Home: 0, End: tokens.length - 1 }[event.key];
  if (event.key === 'Enter') pin(span);
  if (!tokens[next]) return;
  event.preventDefault();
  unpin();
  focusToken(tokens[next]);
  tokens[next].scrollIntoView({ block: 'nearest' });
});

// --- The legend filters tokens; the lists above filter completions, and the legend counts what is left.

const buttons = [...document.querySelectorAll('[data-regime]')];
const chosen = new Set();
for (const button of buttons) {
  button.addEventListener('click', () => {
    const regime = Number(button.dataset.regime);
    if (!chosen.delete(regime)) chosen.add(regime);
    button.setAttribute('aria-pressed', chosen.has(regime));
    document.body.classList.toggle('filtered', chosen.size > 0);
    for (const span of document.querySelectorAll('.completion > span')) {
      span.classList.toggle('shown', chosen.has(regimeOf(span)));
    }
  });
}

const answers = document.getElementById('answers');
const steps = document.getElementById('steps');

function filterRecords() {
  const counts = regimes.map(() => 0);
  let total = 0, left = 0;
  articles.forEach((article, r) => {
    article.hidden = Boolean((answers?.value && article.dataset.verdict !== answers.value)
      || (steps?.value && article.dataset.step !== steps.value));
    if (article.hidden) return;
    left += 1;
    for (const span of completions[r]?.children ?? []) { counts[regimeOf(span)] += 1; total += 1; }
  });
  buttons.forEach((button, i) => {
    button.querySelector('.count').textContent = counts[i].toLocaleString('en');
    button.querySelector('.share').textContent = `${(100 * counts[i] / Math.max(total, 1)).toFixed(1)}\u00a0%`;
  });
  document.getElementById('none').hidden = left > 0 || articles.length === 0;
}
answers?.addEventListener('change', filterRecords);
steps?.addEventListener('change', filterRecords);

// --- Colour by a number: full colour at its 98th percentile on this page, by magnitude.

const colour = document.getElementById('colour');

function paint() {
  const field = colour.value;
  document.body.classList.toggle('heat', field !== 'regime');
  if (field === 'regime') return;
  const sizes = records.flatMap(record => record[field] ?? []).map(number).filter(finite).map(Math.abs).sort((a, b) => a - b);
  const top = sizes[Math.floor(0.98 * (sizes.length - 1))] || 1;
  completions.forEach((completion, r) => {
    [...completion?.children ?? []].forEach((span, n) => {
      const v = number(records[r][field]?.[n] ?? null);
      // What is not finite is what one is looking for: full colour.
      span.style.setProperty('--v', v === null ? 0 : finite(v) ? Math.min(Math.abs(v) / top, 1) : 1);
    });
  });
}
colour?.addEventListener('change', paint);
if (colour && regimes.length === 1) {
  colour.value = colour.options[colour.options.length - 1].value;
  paint();
}

// --- An address such as #3.17 opens the card of token 17 of completion 3.

function openAddress() {
  const [, r, n] = location.hash.match(/^#(\d+)\.(\d+)$/) ?? [];
  const span = completions[r]?.children[n];
  if (!span) return;
  span.scrollIntoView({ block: 'center' });
  focusToken(span);
  pin(span);
}
addEventListener('hashchange', openAddress);
openAddress();
