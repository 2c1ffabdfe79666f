// Markdown as DOM nodes. The text is a model's and may be hostile: nothing is parsed as HTML, images become their
// text, and only http(s) links can be followed. Blocks that have not changed keep their nodes while text streams in.

import { h } from "./dom.js";

const MAX_DEPTH = 6;

/** Show `text` in `host`, which remembers its blocks. */
export function render(host, text) {
  const blocks = blocksOf(text);
  const old = host.blocks ?? [];
  let same = 0;
  while (same < old.length && same < blocks.length && old[same] === blocks[same].key) same += 1;
  while (host.childNodes.length > same) host.lastChild.remove();
  for (const block of blocks.slice(same)) host.append(node(block));
  host.blocks = blocks.map((block) => block.key);
}

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}>\s?(.*)$/;
const TABLE_LINE = /^[\s:|-]+$/;

/** Whether a line separates the head of a table from its body. Not one expression: its three parts would overlap. */
const isTableLine = (line) => TABLE_LINE.test(line) && line.includes("-") && line.indexOf("-") < line.lastIndexOf("|");

function blocksOf(text) {
  const lines = text.replaceAll("\r\n", "\n").split("\n");
  const blocks = [];
  const add = (kind, content) => blocks.push({ kind, ...content, key: `${kind} ${JSON.stringify(content)}` });
  let at = 0;
  const take = (test) => {
    const taken = [];
    while (at < lines.length && test(lines[at], taken.length)) taken.push(lines[at++]);
    return taken;
  };
  while (at < lines.length) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    const heading = HEADING.exec(line);
    if (!line.trim()) at += 1;
    else if (fence) {
      at += 1;
      const code = take((one) => !(one.trim().startsWith(fence[1]) && one.trim().replaceAll(fence[1][0], "") === ""));
      at += 1;
      add("code", { code: code.join("\n"), language: fence[2] });
    } else if (heading) {
      at += 1;
      add("heading", { level: heading[1].length, text: heading[2].replace(/\s#+\s*$/, "") });
    } else if (RULE.test(line)) {
      at += 1;
      add("rule", {});
    } else if (QUOTE.test(line)) {
      add("quote", { text: take((one) => QUOTE.test(one)).map((one) => QUOTE.exec(one)[1]).join("\n") });
    } else if (ITEM.test(line)) {
      add("list", { lines: take((one, n) => ITEM.test(one) || (n > 0 && /^\s+\S/.test(one)) || (!one.trim() && ITEM.test(lines[at + 1] ?? ""))) });
    } else if (line.includes("|") && isTableLine(lines[at + 1] ?? "")) {
      add("table", { lines: take((one) => one.includes("|")) });
    } else {
      add("text", { text: take((one, n) => one.trim() && (n === 0 || !(FENCE.test(one) || HEADING.test(one) || QUOTE.test(one)))).join("\n") });
    }
  }
  return blocks;
}

function node(block, depth = 0) {
  switch (block.kind) {
    case "code":
      return codeNode(block);
    case "heading":
      return h(`h${Math.min(6, block.level + 2)}`, {}, inline(block.text));
    case "rule":
      return h("hr");
    case "quote":
      return h("blockquote", {}, depth < MAX_DEPTH ? blocksOf(block.text).map((one) => node(one, depth + 1)) : block.text);
    case "list":
      return listNode(block.lines, depth);
    case "table":
      return tableNode(block.lines);
    default:
      return h("p", {}, inline(block.text));
  }
}

function codeNode({ code, language }) {
  const copy = h("button", { type: "button", class: "quiet copy", onclick: async () => {
    await navigator.clipboard?.writeText(code);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  } }, "Copy");
  return h("div", { class: "code" }, h("div", { class: "code-head" }, h("span", {}, language || "text"), copy), h("pre", { tabindex: "0" }, h("code", {}, code)));
}

function listNode(lines, depth) {
  const first = ITEM.exec(lines[0]);
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= first[1].length + 1) items.push({ text: item[3], rest: [] });
    else if (line.trim()) items.at(-1).rest.push(line);
  }
  const ordered = /\d/.test(first[2]);
  return h(ordered ? "ol" : "ul", ordered ? { start: Number.parseInt(first[2], 10) } : {}, items.map(({ text, rest }) => {
    const nested = rest.length > 0 && ITEM.test(rest[0]) && depth < MAX_DEPTH;
    return h("li", {}, inline(nested ? text : [text, ...rest.map((line) => line.trim())].join("\n")), nested ? listNode(rest, depth + 1) : null);
  }));
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

function tableNode(lines) {
  const [head, , ...body] = lines;
  return h("div", { class: "scroll", tabindex: "0" }, h("table", {},
    h("thead", {}, h("tr", {}, cells(head).map((cell) => h("th", {}, inline(cell))))),
    h("tbody", {}, body.map((line) => h("tr", {}, cells(line).map((cell) => h("td", {}, inline(cell))))))));
}

const MARKS = [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];

/** The nodes of a line, in one pass. The work grows with the length of the text, whatever the text is. */
function inline(text, depth = 0) {
  const nodes = [];
  let plain = "";
  const flush = () => {
    if (plain) nodes.push(plain);
    plain = "";
  };
  const put = (element, end) => {
    flush();
    nodes.push(element);
    return end;
  };
  const closed = new Map();
  // the last place of each mark is kept, and `from` never goes back, so each mark is looked for once in all
  const find = (mark, from) => {
    const last = closed.get(mark) ?? 0;
    if (last === -1 || last >= from) return last;
    const found = text.indexOf(mark, from);
    closed.set(mark, found);
    return found;
  };
  let at = 0;
  while (at < text.length) {
    const char = text[at];
    let end = -1;
    if (char === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      end = at + 2;
    } else if (char === "`") {
      const ticks = /^`+/.exec(text.slice(at, at + 16))[0];
      const close = find(ticks, at + ticks.length);
      if (close > 0) end = put(h("code", {}, text.slice(at + ticks.length, close).trim()), close + ticks.length);
    } else if (char === "[" || (char === "!" && text[at + 1] === "[")) {
      end = link(text, at, put, depth, find);
    } else if (char === "\n") {
      end = put(h("br"), at + 1);
    } else if ("*_~".includes(char) && depth < MAX_DEPTH) {
      for (const [mark, tag] of MARKS) {
        if (!text.startsWith(mark, at) || /\s/.test(text[at + mark.length] ?? " ")) continue;
        if (mark[0] === "_" && /\w/.test(text[at - 1] ?? "")) continue;
        const close = find(mark, at + mark.length + 1);
        if (close < 0 || /\s/.test(text[close - 1])) continue;
        end = put(h(tag, {}, inline(text.slice(at + mark.length, close), depth + 1)), close + mark.length);
        break;
      }
    }
    if (end < 0) {
      plain += char;
      end = at + 1;
    }
    at = end;
  }
  flush();
  return nodes;
}

function link(text, at, put, depth, find) {
  const image = text[at] === "!";
  const open = at + (image ? 2 : 1);
  const middle = find("](", open);
  const close = middle < 0 ? -1 : find(")", middle);
  if (close < 0 || close - at > 4000) return -1;
  const label = text.slice(open, middle);
  const target = text.slice(middle + 2, close).trim().split(/\s/)[0];
  if (image) return put(h("span", { class: "muted" }, `[image: ${label || target}]`), close + 1);
  const address = safe(target);
  const words = depth < MAX_DEPTH ? inline(label, depth + 1) : label;
  if (!address) return put(h("span", { title: target }, words), close + 1);
  return put(h("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow", title: address }, words), close + 1);
}

/** The address if it is one of the web; null for javascript:, data:, and names of this server. */
function safe(target) {
  if (!/^https?:\/\//i.test(target)) return null;
  try {
    return new URL(target).href;
  } catch {
    return null;
  }
}
