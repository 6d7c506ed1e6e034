// Makes elements. Texts become text nodes, never HTML: what a model or a server says is inert.

/** Returns the element of this id. */
export const byId = (id) => document.getElementById(id);

/** Makes an element with properties of the DOM, and children that are nodes or texts. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** Makes a bar of parts in proportion to their counts, with a list beside it that says the same in words. */
export function bar(parts) {
  const shown = parts.filter((part) => part.count > 0);
  const strip = make("div", { className: "bar", ariaHidden: "true" });
  for (const { count, className, label } of shown) {
    const piece = make("span", { className, title: `${count} ${label}` });
    piece.style.flexGrow = count;
    strip.append(piece);
  }
  const words = parts.map(({ count, className, label }) =>
    make("li", {}, make("span", { className: `swatch ${className}`, ariaHidden: "true" }), `${count} ${label}`),
  );
  return [strip, make("ul", { className: "legend" }, ...words)];
}
