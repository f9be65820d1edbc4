"""The page at `/docs`: reads `openapi.json` and draws it, with nothing fetched from anywhere else."""

from typing import Final

PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>peft-serve: routes</title>
<style>
:root{color-scheme:light dark;--line:#8884;--soft:#8881;--accent:#2563eb}
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
h2{text-transform:capitalize;margin-top:2rem}
details{border:1px solid var(--line);border-radius:8px;margin:.5rem 0;padding:.5rem .9rem}
summary{cursor:pointer}summary b{display:inline-block;min-width:4.5rem;color:var(--accent)}
pre{background:var(--soft);padding:.7rem;border-radius:6px;overflow:auto}code,pre{font:13px/1.45 ui-monospace,monospace}
table{border-collapse:collapse;width:100%}td{border-top:1px solid var(--line);padding:.25rem .5rem;vertical-align:top}
textarea{width:100%;min-height:7rem;font:13px ui-monospace,monospace}button{padding:.3rem .9rem}
</style></head><body>
<h1>peft-serve</h1><p id="about"></p><main id="routes">Loading openapi.json</main>
<script>
const el=(tag,text,...kids)=>{const e=document.createElement(tag);
 if(text)e.textContent=text;e.append(...kids);return e};
const show=(value)=>JSON.stringify(value,null,2);
let doc;
const resolve=(s)=>s&&s.$ref?resolve(s.$ref.slice(2).split('/').reduce((o,k)=>o[k],doc)):(s||{});
const typeOf=(s)=>{if(s.$ref)return s.$ref.split('/').pop();if(s.anyOf)return s.anyOf.map(typeOf).join(' | ');
 if(s.type==='array')return 'list of '+typeOf(s.items||{});return String(s.type||'any')};
const range=(s)=>[['minimum','≥ '],['maximum','≤ '],['exclusiveMinimum','> '],['exclusiveMaximum','< ']]
 .flatMap(([k,t])=>[s,...(s.anyOf||[])].filter(x=>x[k]!==undefined).map(x=>t+x[k])).join(', ');
const fields=(schema)=>{const t=el('table');for(const [name,s] of Object.entries(resolve(schema).properties||{}))
 t.append(el('tr','',el('td','',el('code',name)),el('td',typeOf(s)),el('td',range(s)),el('td',s.description||'')));
 return t};
const trial=(method,path,body)=>{const box=el('textarea');box.value=show(body);const out=el('pre','');
 const go=el('button','Send');go.onclick=async()=>{out.textContent='waiting';try{
 const r=await fetch(path.slice(1)||'./',{method,headers:{'content-type':'application/json'},body:box.value});
 out.textContent=r.status+'\\n'+[...r.headers].map(h=>h.join(': ')).join('\\n')+'\\n\\n'+await r.text()}
 catch(e){out.textContent=String(e)}};return el('div','',box,go,out)};
const route=(path,method,op)=>{const d=el('details');
 const s=el('summary');s.append(el('b',method.toUpperCase()),el('code',path),' '+(op.summary||''));d.append(s);
 for(const p of op.parameters||[])d.append(el('p',p.in+' '+p.name+': '+(p.description||'')));
 for(const [type,c] of Object.entries((op.requestBody||{}).content||{})){d.append(el('h4',type),fields(c.schema));
  if(c.schema&&resolve(c.schema).properties&&resolve(c.schema).properties.parameters)
   d.append(el('h4','parameters'),fields(resolve(c.schema).properties.parameters));
  if(c.example)d.append(trial(method.toUpperCase(),path,c.example))}
 const t=el('table');for(const [status,r] of Object.entries(op.responses||{}))
  t.append(el('tr','',el('td',status),el('td',r.description||'')));
 d.append(el('h4','answers'),t);return d};
fetch('openapi.json').then(r=>r.json()).then(json=>{doc=json;
 document.getElementById('about').textContent=doc.info.description||'';
 const groups={};for(const [path,ops] of Object.entries(doc.paths))for(const [method,op] of Object.entries(ops))
  (groups[(op.tags||['other'])[0]]??=[]).push(route(path,method,op));
 document.getElementById('routes').replaceChildren(...Object.entries(groups).flatMap(([g,all])=>[el('h2',g),...all]))
}).catch(e=>{document.getElementById('routes').textContent=String(e)});
</script></body></html>
"""
