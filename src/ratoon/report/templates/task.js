(function () {
  var holder = document.getElementById("rows");
  if (!holder) return;
  var data = JSON.parse(holder.textContent), rows = data.rows, words = data.words;
  var PAGE = 25, LONG = 420, shown = PAGE, found = [];
  var byId = function (id) { return document.getElementById(id); };
  var form = byId("filters"), list = byId("list"), more = byId("more"), status = byId("found");

  /* Every text of a record goes through here or `textContent`: nothing of it is ever read as HTML. */
  function make(tag, name, text) {
    var element = document.createElement(tag);
    if (name) element.className = name;
    for (var i = 2; i < arguments.length; i++) {
      var part = arguments[i];
      if (part !== undefined && part !== null) element.append(part);
    }
    return element;
  }
  function value(id) { var field = byId(id); return field ? field.value : ""; }
  function percent(share) { return (100 * share).toFixed(share > 0.0995 ? 0 : 1) + " %"; }
  function digits(number) {
    var places = Math.abs(number) > 1 ? 100 : 10000;
    return String(Math.round(number * places) / places);
  }
  function said(text) { return text === "" || text === null || text === undefined ? words.r_nothing : String(text); }

  rows.forEach(function (row) {
    var texts = [row.input, row.id, row.place].concat(row.expected === undefined ? [] : row.expected, row.answer);
    row.haystack = texts.filter(function (text) { return text !== undefined && text !== null; }).join("\n").toLowerCase();
  });

  function folded(text, name) {
    var block = make("p", "text " + (name || ""), text === "" ? words.r_nothing : text);
    var wide = (text.match(/[\u2e80-\uffef]/g) || []).length; /* a Chinese character takes the room of two letters */
    if (text.length + wide <= LONG && text.split("\n").length < 9) return block;
    block.classList.add("clamped");
    var button = make("button", "fold", words.r_long);
    button.type = "button";
    button.setAttribute("aria-expanded", "false");
    button.addEventListener("click", function () {
      var open = !block.classList.toggle("clamped");
      button.textContent = open ? words.r_short : words.r_long;
      button.setAttribute("aria-expanded", String(open));
    });
    return make("div", "", block, button);
  }
  function chip(text, kind) { return make("span", "chip " + kind, said(text)); }
  function named(title, content) { return make("div", "", make("h3", "", title), content); }

  function likely(row) {
    if (!row.top) return null;
    var box = make("ul", "likely"), expected = [].concat(row.expected === undefined ? [] : row.expected);
    row.top.forEach(function (pair) {
      var fill = make("i");
      fill.style.width = (100 * pair[1]).toFixed(1) + "%";
      var there = expected.indexOf(pair[0]) >= 0;
      box.append(make("li", there ? "there" : "", make("span", "", pair[0]), make("span", "meter", fill), make("span", "", percent(pair[1]))));
    });
    return box;
  }
  function labelled(row) {
    var line = make("p", "outcome"), expected = row.expected === undefined ? [] : [].concat(row.expected);
    var answers = [].concat(row.answer === null ? [] : row.answer);
    var want = make("span", "group", make("span", "soft", words.r_expected));
    (expected.length ? expected : [""]).forEach(function (label) { want.append(chip(label, "want")); });
    if (row.wrong !== undefined) line.append(want);
    var given = make("span", "group", make("span", "soft", words.r_answer));
    (answers.length ? answers : [""]).forEach(function (label) {
      var right = expected.indexOf(label) >= 0 || (label === "" && !expected.length);
      given.append(chip(label, row.wrong === undefined ? "open" : right ? "hit" : "miss"));
    });
    line.append(given);
    return [line, folded(row.input), likely(row)];
  }
  function colour(type) { return "t" + data.types.indexOf(type) % 8; }
  function sentence(row, spans, others, mark) {
    var line = make("p", "text tagged"), at = 0;
    function plain(stop) {
      if (stop <= at) return;
      line.append(row.words.slice(at, stop).join(row.join) + (stop < row.words.length ? row.join : ""));
      at = stop;
    }
    spans.forEach(function (span) {
      plain(span[0]);
      var same = !others || others.some(function (o) { return o[0] === span[0] && o[1] === span[1] && o[2] === span[2]; });
      var text = make("mark", colour(span[2]) + (same ? "" : " odd"), row.words.slice(span[0], span[1]).join(row.join));
      text.append(make("small", "", span[2] + (same ? "" : " · " + mark)));
      line.append(text);
      at = span[1];
      if (at < row.words.length) line.append(row.join);
    });
    plain(row.words.length);
    return line;
  }
  function tagged(row) {
    if (!row.words.length) {
      var told = function (spans) { return (spans || []).map(function (s) { return s[2] + " " + (s[0] + 1) + "–" + s[1]; }).join(", "); };
      return [folded(row.input), make("p", "note", words.r_expected + ": " + said(told(row.there))), make("p", "note", words.r_answer + ": " + said(told(row.found)))];
    }
    if (row.there && row.wrong) {
      return [named(words.r_expected, sentence(row, row.there, row.found, words.r_missed)), named(words.r_answer, sentence(row, row.found, row.there, words.r_invented))];
    }
    return [sentence(row, row.found, null, "")];
  }
  function numbered(row) {
    var line = make("p", "outcome");
    if (row.expected !== undefined) line.append(make("span", "group", make("span", "soft", words.r_expected), chip(digits(row.expected), "want")));
    line.append(make("span", "group", make("span", "soft", words.r_answer), chip(row.answer === null ? "" : digits(row.answer), "open")));
    if (row.off !== undefined) line.append(make("span", "soft", " " + words.r_error + " " + (row.off < 0 ? "−" : "+") + digits(Math.abs(row.off))));
    return [line, folded(row.input)];
  }
  function texts(row) {
    var three = make("div", "three", named(words.r_input, folded(row.input)));
    if (row.expected) {
      var box = make("div", "", make("h3", "", data.kind === "choice" ? words.r_chosen : words.r_reference));
      if (!row.expected.length) box.append(folded("", "soft"));
      row.expected.forEach(function (text) { box.append(folded(text)); });
      three.append(box);
    }
    if (data.kind === "choice") three.append(named(words.r_model, make("p", "outcome", chip(row.answer, row.wrong ? "miss" : "hit"))));
    else if (row.answer !== null) three.append(named(words.r_answer, folded(row.answer, "answer")));
    var parts = [three];
    if (row.scores) {
      parts.push(make("p", "note scores", Object.keys(row.scores).map(function (name) {
        return data.names[name] + " " + digits(row.scores[name]);
      }).join(" · ")));
    }
    return parts;
  }
  var draw = { label: labelled, labels: labelled, tags: tagged, number: numbered };

  function record(row) {
    var item = make("li", "record" + (row.wrong === true ? " wrong" : row.wrong === false ? " right" : ""));
    (draw[data.kind] || texts)(row).forEach(function (part) { if (part) item.append(part); });
    var foot = make("p", "note place");
    if (row.wrong !== undefined) foot.append(make("b", row.wrong ? "bad" : "good", row.wrong ? words.r_wrong : words.r_right), " · ");
    if (row.id) foot.append(make("span", "", row.id), " · ");
    foot.append(make("code", "", row.place));
    item.append(foot);
    return item;
  }
  function has(row, key, choice) { return !choice || (row[key] || []).indexOf(choice.slice(1)) >= 0; }
  function select() {
    var text = value("f-search").trim().toLowerCase(), show = value("f-show"), order = value("f-sort");
    found = rows.filter(function (row) {
      return (show !== "errors" || row.wrong) && (show !== "right" || row.wrong === false) &&
        has(row, "expected_of", value("f-expected")) && has(row, "answered_of", value("f-answer")) &&
        (!text || row.haystack.indexOf(text) >= 0);
    });
    var by = data.sorted_by[order];
    if (by) {
      found.sort(function (one, other) {
        var a = one[by[0]], b = other[by[0]];
        if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
        return by[1] * (Math.abs(a) - Math.abs(b));
      });
    }
    shown = PAGE;
    list.replaceChildren();
    fill();
  }
  function fill() {
    found.slice(list.children.length, shown).forEach(function (row) { list.append(record(row)); });
    var told = function (n) { return n.toLocaleString("en"); };
    status.textContent = found.length ? words.r_found.replace("{n}", told(found.length)).replace("{all}", told(rows.length)) : words.r_none;
    more.hidden = shown >= found.length;
  }

  form.hidden = false;
  form.addEventListener("submit", function (event) { event.preventDefault(); });
  form.addEventListener("input", select);
  form.addEventListener("reset", function () { setTimeout(select, 0); });
  more.addEventListener("click", function () { shown += PAGE; fill(); });
  document.querySelectorAll("[data-expected]").forEach(function (button) {
    button.hidden = false;
    button.addEventListener("click", function () {
      form.reset();
      setTimeout(function () {
        byId("f-show").value = "errors";
        byId("f-expected").value = "=" + button.dataset.expected;
        byId("f-answer").value = "=" + button.dataset.answer;
        select();
        byId("records").scrollIntoView();
      }, 0);
    });
  });
  select();
})();
